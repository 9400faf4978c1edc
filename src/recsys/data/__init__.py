"""From event logs to datasets and training batches."""
