"""What a chat template makes of a dialogue: the prompt that a model gets, and the text that it is trained on.

Qwen3's template renders the thinking of the last reply itself. That of DeepSeek-R1-Distill takes all thinking out of
the replies it renders, and its prompt may open the block: then what follows the prompt is put together here.
"""

OPEN, CLOSE = "<think>\n", "\n</think>\n\n"


def generation_prompt(dialogue: list[dict], tokenizer, thinking: bool = True) -> str:
    """The text up to where the model begins its reply. Without thinking it ends with an empty block."""
    prompt = tokenizer.apply_chat_template(
        dialogue, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    if thinking or renders_thinking(tokenizer) or "</think>" not in tokenizer.chat_template:
        return prompt
    return prompt + (CLOSE if opens_block(prompt) else OPEN + CLOSE)


def whole_text(messages: list[dict], prompt: str, tokenizer) -> str:
    """The prompt and the last message, up to its end token. prompt: `generation_prompt` of the messages before it."""
    if renders_thinking(tokenizer):
        return tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
    reply, thinking = messages[-1], ""
    if "reasoning_content" in reply:
        thinking = ("" if opens_block(prompt) else OPEN) + reply["reasoning_content"].strip() + CLOSE
    return prompt + thinking + reply["content"].strip() + tokenizer.eos_token


def renders_thinking(tokenizer) -> bool:
    return "reasoning_content" in tokenizer.chat_template


def opens_block(prompt: str) -> bool:
    """Whether the reply to the prompt begins inside of its thinking."""
    return prompt.rstrip().endswith("<think>")


def has_block(prompt: str) -> bool:
    """Whether the prompt ends with the empty block of thinking that asks for an answer alone."""
    return prompt.rstrip().endswith("</think>")
