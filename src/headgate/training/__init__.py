"""Floor 4: HeadgateTrainer, stages, checkpoints, accounting, telemetry."""
