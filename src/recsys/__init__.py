"""recsys: from a shop's event log to recommendations that follow people's interests."""

__version__ = "0.1.0"
