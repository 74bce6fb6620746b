"""What the notebooks use: figures, widgets, exercise checks, and the launcher behind `make lab`."""
