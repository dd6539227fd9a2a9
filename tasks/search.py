"""Agentic search, the paper's setting with several turns: questions, and a tool `search`.

    python espl.py --task search:passages.jsonl        # NQ and HotpotQA from the hub
    python espl.py --task search:passages.jsonl --train-file a.jsonl --test-file b.jsonl

A line of passages.jsonl is {"id": …, "title": …, "text": …}, a line of questions {"question": …,
"golden_answers": […]}. Retrieval is BM25; the paper's code for this setting is not released.
In the paper (gpt-oss-120b): base model 6.6, evolution of prompts 34.0, RL 44.2, E-SPL 48.6 %.
"""

import hashlib
import json
import logging
import os
import random
import shutil
import string
import tempfile
from pathlib import Path

from mathematics import accepted, hub
from tool_calls import answer_call

DEFAULTS = {"train_size": 196}
TEST_SIZE = 64
MAX_CALLS = 4
TOOLS = {}  # `search`, once the passages are read

PROMPTS = """
[system]
You are an expert assistant who solves tasks using a search tool. Think before you call the tool
and after you receive its reply. Decide what to search for, call the tool, and search again with
what you have learned until you know the answer. Then write "Answer:", once, and after it the answer
of one to five words and nothing else.

The tool `search` returns the best passages of an encyclopedia for up to four queries, which may be
questions or key words. To call it, write a line like the following and wait:
<tool_call>{"name": "search", "arguments": {"query_list": ["a query", "another query"]}}</tool_call>
The reply stands between <tool_response> and </tool_response>. You can call the tool four times.

Before you begin, read the following principles carefully, and use those that apply:
{principles}

[principles]
"""


def problems(config):
    """The questions of Search-R1. Reads the passages first."""
    if not config.task_argument:
        raise ValueError('name the passages: --task search:FILE, with {"text": …} on each line')
    TOOLS["search"] = search_tool(read_passages(config.task_argument))
    name = "PeterJinGo/nq_hotpotqa_train"
    train, test = hub(config, [f"{name}:train"], [f"{name}:test"])
    return train, random.Random(config.seed).sample(test, min(TEST_SIZE, len(test)))


def reward(record, response):
    """EM + 0.1 (format - 1) of the model's last turn, and the outcome.

    format: there is exactly one "Answer:"; EM: what follows it is an accepted answer.
    """
    said = response.rpartition("</tool_response>")[2].split("Answer:")
    if len(said) != 2:
        return -0.1, "no_answer"
    answer = words(said[1])
    if answer and answer in [words(str(gold)) for gold in accepted(record)]:
        return 1.0, "correct"
    return 0.0, "wrong"


def words(text):
    """Words of an answer to compare: in lower case, without punctuation and articles."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def environment(chat, rollout):
    """Answers the calls of `search` in a response."""
    return answer_call(chat, rollout, TOOLS, MAX_CALLS)


def read_passages(path):
    """Title and text of the passages of a JSONL file. Errors name file and line."""
    passages = []
    for n, line in enumerate(Path(path).read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            passages.append(f"{record.get('title') or ''}\n{record['text'] + ''}".strip())
        except (ValueError, KeyError, TypeError, AttributeError):
            wanted = '{"id": …, "title": …, "text": …}'
            raise ValueError(f"{path}:{n}: not a passage; write {wanted} on each line") from None
    if not passages:
        raise ValueError(f"there is no passage in {path}")
    return passages


def search_tool(passages):
    """The function `search` over these passages."""
    import bm25s

    index = search_index(passages)

    def search(query_list):
        if not isinstance(query_list, list) or not all(isinstance(q, str) for q in query_list):
            raise ValueError("query_list must be a list of texts")
        replies = []
        for query in query_list[:4]:
            tokens = bm25s.tokenize([query], stopwords="en", show_progress=False)
            found, scores = index.retrieve(
                tokens,
                k=min(3, len(passages)),
                show_progress=False,
                backend_selection="numpy",  # by default it would use JAX
            )
            hits = [passages[i] for i, score in zip(found[0], scores[0]) if score > 0]
            replies.append("\n\n".join([f"Query: {query}", *(hits or ["Nothing found."])]))
        return "\n\n".join(replies) or "Error: query_list is empty."

    return search


def search_index(passages):
    """The BM25 index of these passages. It is kept in the user's cache."""
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "espl"
    path = cache / f"bm25-{hashlib.sha256(json.dumps(passages).encode()).hexdigest()[:16]}"
    try:
        return bm25s.BM25.load(path, mmap=True)
    except Exception:  # it is not there, or not complete
        index = bm25s.BM25()
    index.index(bm25s.tokenize(passages, stopwords="en", show_progress=False), show_progress=False)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as part:  # another run may be reading
            index.save(Path(part) / "index", show_progress=False)
            shutil.rmtree(path, ignore_errors=True)
            (Path(part) / "index").rename(path)
    except OSError as e:
        logging.warning("could not keep the search index in %s: %s", path, e)
    return index
