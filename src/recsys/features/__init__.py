"""Feature columns of the second stage, declared once: preparing, training and serving share this.

`columns` is the declaration (YAML), `learnt` what training data says of a column, `against_path`
the candidates against the history, `context` what a request says, `layout` what comes out;
`encoder.Features` joins them.
"""

from recsys.features.columns import Column, declare
from recsys.features.encoder import Features
from recsys.features.layout import Field, ItemTable, Layout, Rate, gather
from recsys.features.learnt import OTHER

__all__ = [
    "OTHER",
    "Column",
    "Features",
    "Field",
    "ItemTable",
    "Layout",
    "Rate",
    "declare",
    "gather",
]
