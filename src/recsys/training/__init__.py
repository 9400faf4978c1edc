"""Lightning modules and callbacks, training and resuming, and the test of a run."""
