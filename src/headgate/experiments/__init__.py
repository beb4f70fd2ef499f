"""Floor 6: recipes, run directories, comparisons, sweeps, statistics, reports, export."""
