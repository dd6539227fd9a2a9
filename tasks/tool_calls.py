"""Calls of tools inside a response, for tasks that have tools. tasks/search.py is an example.

The model writes <tool_call>{"name": "search", "arguments": {...}}</tool_call>. Sampling stops
there, the reply is put behind the call as a turn of the user's, and the model goes on.
"""

import bisect
import json
import re

LONGEST_CALL = 4000  # characters


def answer_call(chat, rollout, tools, max_calls):
    """The environment of a task with tools: {name: function of keyword arguments, returns a text}.

    If the model's turn holds a call, cuts off what follows it and returns the tokens of the reply;
    [] after too many calls. None: there is no call.
    """
    tokens, logprobs = rollout.tokens, rollout.logprobs
    start = len(tokens)  # of the model's turn
    while start > 0 and logprobs[start - 1] is not None:
        start -= 1

    def has_call(end):
        return "</tool_call>" in chat.tokenizer.decode(tokens[start:end])

    if not has_call(len(tokens)):
        return None
    end = bisect.bisect_left(range(len(tokens)), True, lo=start, key=has_call)
    del tokens[end:], logprobs[end:]
    replies = sum(a is not None and b is None for a, b in zip(logprobs, logprobs[1:]))
    if replies == max_calls:
        rollout.stop = "calls"
        return []
    opened = chat.text([], rollout.prompt + tokens[:start])  # by the template: "<think>" or ""
    return reply_turn(chat, call(tools, opened + chat.tokenizer.decode(tokens[start:])))


def call(tools, text):
    """A tool's reply to the call with which the text ends, or what is wrong with the call."""
    text = text.rpartition("</think>")[2]
    before, tag, call = text.partition("</tool_call>")[0].partition("<tool_call>")
    if not tag:
        return "Error: </tool_call> without <tool_call> before it."
    if "<think>" in before:
        return "Error: a call inside <think> is not made. Write </think> first."
    if "<tool_call>" in call or len(call) > LONGEST_CALL:
        return (
            f"Error: one call in each <tool_call></tool_call>, of up to {LONGEST_CALL} characters."
        )
    try:
        call = json.loads(call, strict=False)  # which allows a newline in a string
        name, arguments = call["name"], call["arguments"]
        if isinstance(arguments, str):
            arguments = json.loads(arguments, strict=False)
        if name not in tools:
            return f"Error: unknown tool. There is: {', '.join(tools)}."
        return str(tools[name](**arguments))
    except (KeyError, TypeError) as e:
        return f'Error: {e}. Write <tool_call>{{"name": …, "arguments": {{…}}}}</tool_call>.'
    except (Exception, SystemExit) as e:
        return f"Error: {str(e) or type(e).__name__}"


def reply_turn(chat, reply):
    """Token ids of a reply. They end the model's turn, and begin its next after the user's."""
    reply = reply.encode("utf-8", "replace").decode()  # half a surrogate pair is no text
    # No text of a tool may end its turn, or look like what the model says.
    reply = chat.clean(re.sub("</?(tool_call|tool_response|think)>", " ", reply))
    reply = f"<tool_response>\n{reply}\n</tool_response>"
    mark = "what the model said"
    text = chat.render(("user", "-"), ("assistant", mark), ("user", reply))
    if not text:  # there is no chat template
        text = f"{mark}\n{reply}\n"
    return chat.tokenizer(text.partition(mark)[2], add_special_tokens=False).input_ids
