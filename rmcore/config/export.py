"""The section `export`: what a model directory holds besides the reward model.

Example: `export.lm_head=true` without loss.sft is an error, because only loss.sft trains a language-model head.
"""

from pydantic import Field

from rmcore.config.section import Section


class ExportConfig(Section):
    """what the exported model holds"""

    lm_head: bool = Field(
        False,
        description="with loss.sft: the trained language-model head; AutoModelForCausalLM then loads it, too",
    )
