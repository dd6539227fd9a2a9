"""Agentic search, the paper's multi-turn setting: questions, and a tool `search` over the passages of a file.

    python espl.py --task search --corpus-file passages.jsonl         # NQ + HotpotQA from the hub: 196 train, 64 test
    python espl.py --task search --corpus-file passages.jsonl --train-file a.jsonl --test-file b.jsonl

A line of the corpus is {"id": …, "title": …, "text": …}, a line of questions {"question": …, "golden_answers": […]}.
The paper's code for this setting is not released; here retrieval is BM25, a millisecond a query over 100,000 passages.
"""

import hashlib
import json
import logging
import os
import shutil
import string
import tempfile
from functools import partial
from pathlib import Path

FLAGS = {"corpus_file": ("", "JSONL of the passages that are searched")}
DEFAULTS = dict(train_size=196, test_size=64)

PROMPTS = """
[system]
You are an expert assistant who solves tasks using a search tool. Think before you call the tool and after you receive its
reply. Decide what to search for, call the tool, and search again with what you have learned until you know the answer. Then
write "Answer:", once, and after it the answer of one to five words and nothing else.

To call a tool, write a JSON object with its name and arguments between <tool_call> and </tool_call>, and wait. Example:
<tool_call>{"name": "the tool's name", "arguments": {"an argument's name": "its value"}}</tool_call>
The reply stands between <tool_response> and </tool_response>. The tools are:
{tools}

Before you begin, read the following principles carefully, and use those that apply:
{principles}

[principles]
"""


def problems(config) -> tuple[list[dict], list[dict]]:
    """The questions of Search-R1, from the hub."""
    from datasets import load_dataset
    name = "PeterJinGo/nq_hotpotqa_train"
    return tuple([dict(row) for row in load_dataset(name, split=split)] for split in ("train", "test"))


def reward(record: dict, response: str) -> tuple[float, str]:
    """EM + 0.1 (format - 1). format: there is exactly one "Answer:"; EM: what follows it is an accepted answer."""
    golds = next(record[k] for k in ("golden_answers", "answer", "groundtruth") if record.get(k) is not None)
    said = response.split("Answer:")
    if len(said) != 2:
        return -0.1, "no_answer"
    golds, answer = golds if isinstance(golds, list) else [golds], words(said[1])
    return (1.0, "correct") if answer and answer in [words(str(g)) for g in golds] else (0.0, "wrong")


def words(text: str) -> list[str]:
    """Words of an answer to compare: in lower case, without punctuation and articles."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def tools(config) -> dict:
    """The one tool, `search`."""
    if not config.corpus_file:
        raise ValueError('give --corpus-file: JSONL, {"id": …, "title": …, "text": …} on each line')
    return {"search": search_tool(read_passages(config.corpus_file))}


def read_passages(path: str) -> list[str]:
    """Title and text of the passages of a JSONL file. Raises ValueError with file and line number."""
    passages = []
    for n, line in enumerate(Path(path).read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                record = json.loads(line)
                passages.append(f"{record.get('title') or ''}\n{record['text'] + ''}".strip())
            except (ValueError, KeyError, TypeError, AttributeError):
                wanted = '{"id": …, "title": …, "text": …}'
                raise ValueError(f"{path}:{n}: not a passage; write {wanted} on each line") from None
    if not passages:
        raise ValueError(f"there is no passage in {path}; choose another --corpus-file")
    return passages


def search_tool(passages: list[str]):
    """The three best passages for each query, by BM25. The index is kept in the user's cache."""
    import bm25s
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "espl"
    path = cache / f"bm25-{hashlib.sha256(json.dumps(passages).encode()).hexdigest()[:16]}"
    tokens = partial(bm25s.tokenize, stopwords="en", show_progress=False)
    try:
        index = bm25s.BM25.load(path, mmap=True)
    except Exception:  # not there, or not complete
        index = bm25s.BM25()
        index.index(tokens(passages), show_progress=False)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as part:  # another run may be reading the old one
                index.save(Path(part) / "index", show_progress=False)
                shutil.rmtree(path, ignore_errors=True)
                (Path(part) / "index").rename(path)
        except OSError as e:
            logging.warning("could not keep the search index in %s: %s", path, e)

    def search(query_list: list[str]) -> str:
        """Searches an encyclopedia and returns the best passages for each query.

        Args:
            query_list: Questions or key words. Each is searched on its own.
        """
        if not isinstance(query_list, list) or not all(isinstance(q, str) for q in query_list):
            raise ValueError("query_list must be a list of texts")
        replies = []
        for query in query_list[:4]:
            found, scores = index.retrieve(tokens([query]), k=min(3, len(passages)), show_progress=False,
                                           backend_selection="numpy")  # by default it would use JAX
            hits = [passages[i] for i, score in zip(found[0], scores[0]) if score > 0]
            replies.append("\n\n".join([f"Query: {query}", *(hits or ["Nothing found."])]))
        return "\n\n".join(replies) or "Error: query_list is empty."

    return search
