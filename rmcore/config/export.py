"""The section `export`: what the exported model directory holds.

Example: `export.lm_head=true` without loss.sft is an error, because only loss.sft trains a language-model head.
"""

from pydantic import Field

from rmcore.config.section import Section


class ExportConfig(Section):
    """form of the exported model"""

    adapter: bool = Field(
        False,
        description="with model.lora: export the adapter and the score head, which peft and rmcore load onto the base "
        "model, in place of a merged model; `rmcore export` makes either of a checkpoint",
    )
    lm_head: bool = Field(
        False,
        description="with loss.sft: the trained language-model head; AutoModelForCausalLM then loads it, too",
    )
    towers: bool = Field(
        True,
        description="of a model with towers for images or sound: export them, too; false exports the text model alone, "
        "a plain decoder, which vLLM loads",
    )
