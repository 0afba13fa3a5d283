"""What saving and loading cost, measured against what a user would otherwise run: ``python -m benchmarks --list``."""
