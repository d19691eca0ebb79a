"""The tiny embedded models, on which the whole loop runs without a download."""

from collections.abc import Iterable

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast, Qwen3_5TextConfig, Qwen3Config

TINY = ("tiny", "tiny-qwen3.5")
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
THINK_TOKENS = ["<think>", "</think>"]
# Text messages come out as Qwen3's own template renders them: the thinking of turns before the last
# question is left out, and a last reply without thinking gets an empty block.
CHATML_TEMPLATE = """\
{%- set last = namespace(question=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set last.question = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- set thinking = message.reasoning_content or '' %}
        {%- if loop.index0 > last.question and (thinking or loop.last) %}
            {{- '<think>\\n' + thinking + '\\n</think>\\n\\n' }}
        {%- endif %}
    {%- endif %}
    {{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
# As that of Qwen3.5, whose prompt opens the block of thinking.
OPENING_TEMPLATE = (
    CHATML_TEMPLATE.removesuffix("    {%- endif %}\n{%- endif %}\n")
    + """\
    {%- else %}
        {{- '<think>\\n' }}
    {%- endif %}
{%- endif %}
"""
)


def tiny_tokenizer(texts: Iterable[str], chat_template: str = CHATML_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a vocabulary of 2,048 made from texts, with Qwen3's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2043,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # As in Qwen3 the think tokens are tokens of their own, but not skipped with the special ones.
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in THINK_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def tiny_config(tokenizer) -> Qwen3Config:
    """Of a Qwen3 of 1.0 million parameters, on which the whole loop runs on a CPU."""
    return Qwen3Config(
        vocab_size=2048,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=384,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_qwen3_5_config(tokenizer) -> Qwen3_5TextConfig:
    """The same of a Qwen3.5: three recurrent layers and one of attention."""
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
            "intermediate_size", "max_position_embeddings", "tie_word_embeddings", "bos_token_id", "eos_token_id",
            "pad_token_id")  # fmt: skip
    config = tiny_config(tokenizer)
    return Qwen3_5TextConfig(
        **{name: getattr(config, name) for name in same},
        full_attention_interval=config.num_hidden_layers,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        rope_parameters={
            "rope_type": "default", "rope_theta": 10_000_000, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1]
        },
    )  # fmt: skip
