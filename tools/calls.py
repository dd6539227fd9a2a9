"""Calls of a task's tools inside a response. Loaded by espl.py for tasks that have tools; no program.

A tool is a function of keyword arguments that returns a text; its signature and docstring are what the model is told.
"""

import json
import re
import sys
from pathlib import Path
from typing import Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import espl  # noqa: E402  (the very module of the program that loads this)

TAGS, LONGEST_CALL = re.compile(r"</?tool_(?:call|response)>"), 4_000  # of a tool's call, in characters


def described(tools: dict[str, Callable[..., str]]) -> str:
    """The tools as a system prompt lists them, a JSON schema a line. Raises UserError for one without type hints or
    docstring."""
    from transformers.utils import get_json_schema
    lines = []
    for name, tool in tools.items():
        with espl.explained(f"tool {name}", "give it type hints and a docstring with Args:"):
            lines.append(json.dumps(get_json_schema(tool)["function"] | {"name": name}))
    return "\n".join(lines)


def answer_call(run: espl.Run, prompts: list[list[int]], g: int, r: espl.Response) -> list[int] | None:
    """The `environment` of `generate`: if the model's turn holds a call of a tool, cuts the response after it and
    returns the tokens of the reply, or [] after too many calls."""
    start, tag = r.turn, "</tool_call>"
    # The tag may be several tokens, the last of them among the latest. What came before them was looked at before, but
    # for the up to 15 tokens in which a tag may have begun.
    seen = max(start, len(r.tokens) - espl.DECODE_CHUNK - 16)
    called = lambda end: tag in run.chat.text(r.tokens[seen:end], special=True)
    if not called(len(r.tokens)):
        return None
    end = next(end for end in range(seen + 1, len(r.tokens) + 1) if called(end))  # the rest is taken back
    del r.tokens[end:], r.logprobs[end:]
    r.calls += 1
    if r.calls > run.config.max_tool_calls:
        r.stop = "calls"
        return []
    return tool_turn(run.chat, espl.on_host_0(call_tool, run.task.tools, run.chat.text(
        r.tokens[start:], r.tokens[:start] or prompts[g], special=True)))


def call_tool(tools: dict[str, Callable[..., str]], text: str) -> str:
    """What a tool replies to the call <tool_call>{"name": …, "arguments": {…}}</tool_call> with which `text`, a turn of
    the model, ends; of a malformed call, why it is. Never raises."""
    text = re.sub(r"<think>.*?(</think>|\Z)", lambda m: "" if m[1] else m[0], text, flags=re.S)  # may hold tags
    before, tag, call = text.partition("</tool_call>")[0].partition("<tool_call>")
    if not tag:
        return "Error: </tool_call> without <tool_call> before it."
    if "<think>" in before.rpartition("</think>")[2]:
        return "Error: a call inside <think> is not made. Write </think> first."
    if "<tool_call>" in call or len(call) > LONGEST_CALL:
        return f"Error: one call in each <tool_call></tool_call>, of at most {LONGEST_CALL} characters."
    try:
        match json.loads(call):
            case {"name": str(name), "arguments": dict(arguments)} if name in tools:
                return str(tools[name](**arguments))
            case {"name": str(), "arguments": dict()}:
                return f"Error: unknown tool. There is: {', '.join(tools)}."
        return 'Error: write <tool_call>{"name": …, "arguments": {…}}</tool_call>.'
    except Exception as e:  # of JSON, of the arguments, or of the tool itself
        return f"Error: {espl.first_line(e)}"


def tool_turn(chat: espl.Chat, reply: str) -> list[int]:
    """Token ids of a tool's reply, which end the model's turn and begin its next: in the tool role of the template,
    or as a user's turn in tags where it has none; without a template only in tags."""
    reply = reply.encode("utf-8", "replace").decode()  # half a surrogate pair is no text
    reply = chat.control.sub(" ", TAGS.sub(" ", reply))  # no text of a tool may end its turn
    tagged, mark = f"<tool_response>\n{reply}\n</tool_response>", "what the model said"
    before = [{"role": "user", "content": "-"}, {"role": "assistant", "content": mark}]
    turns = {"role": "tool", "content": reply}, {"role": "user", "content": tagged}
    text = chat.render([[*before, turn] for turn in turns], reply) or f"{mark}\n{tagged}\n"
    return chat.tokenizer(text.partition(mark)[2], add_special_tokens=False).input_ids
