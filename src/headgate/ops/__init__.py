"""Floor 0: tensors in, tensors out. The equations of the papers, readable as equations."""
