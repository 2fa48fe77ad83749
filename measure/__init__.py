"""What was measured, told: reports of runs."""
