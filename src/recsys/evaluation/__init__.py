"""Full-ranking evaluation: protocol, scorers, baselines, significance, pictures."""
