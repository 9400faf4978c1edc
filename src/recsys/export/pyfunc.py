"""The code of a registered bundle: MLflow runs this file where the model is loaded.

It is kept as source beside the model ("models from code"), so nothing is ever unpickled.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

if TYPE_CHECKING:
    import pandas as pd

    from recsys.serving.messages import RecommendRequest


class BundleModel(PythonModel):
    """Answers a table of `user_id` or `history` (lists of item ids) with items and scores.

    Either column may be left out, or be empty in a row: None for `user_id`, [] for `history`. A row
    with neither is a newcomer and gets popular items.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Open the bundle that was stored with the model."""
        from recsys.serving.engine import Engine

        self.engine = Engine.load(Path(context.artifacts["bundle"]))

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Return one row a request: `item_ids` and `scores`, best first, `k` of them."""
        import pandas as pd

        requests = [_request(row, params or {}) for row in model_input.to_dict("records")]
        answers = [answer.items for answer in self.engine.recommend(requests)]
        return pd.DataFrame(
            {
                "item_ids": [[item.item_id for item in items] for items in answers],
                "scores": [[item.score for item in items] for items in answers],
            },
            index=model_input.index,
        )


def _request(row: dict[str, Any], params: dict[str, Any]) -> RecommendRequest:
    from recsys.serving.messages import RecommendRequest

    user_id, history = row.get("user_id"), row.get("history")
    return RecommendRequest(
        user_id=user_id if isinstance(user_id, str) else None,
        history=None if history is None else list(history),
        k=int(params.get("k", 10)),
        exclude_seen=bool(params.get("exclude_seen", True)),
    )


set_model(BundleModel())
