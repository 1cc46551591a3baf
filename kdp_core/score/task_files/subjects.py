"""A task of many subjects, such as MMLU and CMMLU. The few-shot examples have the same subject as the scored item."""
from collections import defaultdict
from typing import Any

from lm_eval.api.task import ConfigurableTask


class BySubject(ConfigurableTask):
    """lm-eval's task class, in which the few-shot examples of a prompt are drawn only from the subject of the item."""

    def __init__(self, config: dict[str, Any]) -> None:
        # lm-eval also passes the key that named this class
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def fewshot_context(self, doc: dict[str, Any], num_fewshot: int, **settings: Any) -> str:
        """The prompt of one item."""
        if num_fewshot:
            if not hasattr(self, "_of_subject"):
                self._of_subject = defaultdict(list)
                for example in self.sampler.df:
                    self._of_subject[_subject(example)].append(example)
            self.sampler.replace_df(self._of_subject[_subject(doc)])
        return super().fewshot_context(doc, num_fewshot=num_fewshot, **settings)


def _subject(item: dict[str, Any]) -> str:
    return item["Subject"] if "Subject" in item else item["subject"]
