"""Floor 1: nn.Modules over ops."""
