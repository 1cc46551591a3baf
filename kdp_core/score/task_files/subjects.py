"""A task of many subjects whose few-shot examples are of the scored item's own subject, as MMLU and CMMLU want it."""
from collections import defaultdict
from typing import Any

from lm_eval.api.task import ConfigurableTask


class BySubject(ConfigurableTask):
    """lm-eval's task, with the sampler's rows changed to those of the subject before each prompt is made."""

    def __init__(self, config: dict[str, Any]) -> None:
        # lm-eval hands on the key that named this class
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def fewshot_context(self, doc: dict[str, Any], num_fewshot: int, **settings: Any) -> str:
        """The prompt of one item."""
        if num_fewshot:
            if not hasattr(self, "_of_subject"):
                self._of_subject = defaultdict(list)
                for row in self.sampler.df:
                    self._of_subject[_subject(row)].append(row)
            self.sampler.replace_df(self._of_subject[_subject(doc)])
        return super().fewshot_context(doc, num_fewshot=num_fewshot, **settings)


def _subject(row: dict[str, Any]) -> str:
    return row["Subject"] if "Subject" in row else row["subject"]
