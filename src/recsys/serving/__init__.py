"""Serving: a bundle answers over HTTP or in this process; no torch, Lightning or Hydra."""
