"""Instruction pairs: the permitted ones, and pairs derived from permitted text.

Derived pairs carry nothing that is not in the text they come from: a standard-library function answers a request made
of its own name and docstring, a textbook section answers "explain" with its title, and a passage is continued by the
passage that follows it. All choices are drawn from one seeded generator.
"""

from __future__ import annotations

import ast
import random
import re
import textwrap
from collections.abc import Iterator

Conversation = list[tuple[str, str]]

SYSTEM_LINES = (
    "You are a helpful assistant.",
    "You are a careful assistant. Answer briefly and clearly.",
    "You write clear English and plain Python.",
)
WRITE = (
    "Write a Python function {signature} that does this: {purpose}",
    "Write a Python function named {name}. {purpose}",
    "Implement {signature} in Python. {purpose}",
    "In Python, how would you write a function called {name}? {purpose}",
)
DESCRIBE = (
    "What does this Python function do?\n\n```python\n{code}\n```",
    "Explain this code:\n\n```python\n{code}\n```",
    "Write a docstring for this function:\n\n```python\n{code}\n```",
)
EXPLAIN = (
    "Explain: {title}",
    "What should I know about {title}?",
    "Write a short text about {title}.",
    "Tell me about {title}.",
)
CONTINUE = ("Continue this text:\n\n{text}", "Write what comes next:\n\n{text}", "Go on with this passage:\n\n{text}")
MAX_ANSWER = 2400


def solved_problems(records: list[dict[str, object]]) -> Iterator[Conversation]:
    """Grade-school problems with their worked answers; calculator marks are dropped, the result gets a sentence."""
    for record in records:
        answer = re.sub(r"<<[^>]*>>", "", str(record["answer"]))
        answer = re.sub(r"\n#### (.*)$", r"\nThe answer is \1.", answer)
        yield [("user", str(record["question"])), ("assistant", answer)]


def seed_tasks(records: list[dict[str, object]]) -> Iterator[Conversation]:
    """Hand-written tasks: instruction, optional input, output."""
    for record in records:
        instances = record["instances"]
        assert isinstance(instances, list)
        for instance in instances:
            request = str(record["instruction"])
            if instance["input"]:
                request += "\n\n" + str(instance["input"])
            yield [("user", request), ("assistant", str(instance["output"])[:MAX_ANSWER])]


def referenced_questions(records: list[dict[str, object]]) -> Iterator[Conversation]:
    """Two-turn questions that come with reference answers."""
    for record in records:
        turns, answers = record["turns"], record.get("reference")
        if not isinstance(turns, list) or not isinstance(answers, list):
            continue
        conversation: Conversation = []
        for turn, answer in zip(turns, answers, strict=False):
            conversation += [("user", str(turn)), ("assistant", str(answer)[:MAX_ANSWER])]
        yield conversation


def _without_docstring(node: ast.FunctionDef, source: str) -> str | None:
    """Source of a function with its docstring lines removed, or None when nothing would be left."""
    if len(node.body) < 2:
        return None
    lines = source.splitlines()
    first, rest = node.body[0], node.body[1]
    head = lines[node.lineno - 1 : first.lineno - 1]
    body = lines[(first.end_lineno or first.lineno) : node.end_lineno]
    if first.lineno == node.lineno or rest.lineno <= (first.end_lineno or first.lineno):
        return None
    return textwrap.dedent("\n".join(head + body)).strip("\n")


def functions(module: str) -> Iterator[tuple[str, str, str, str, str]]:
    """(name, signature, docstring, code, code without docstring) of documented functions of up to 45 lines."""
    try:
        tree = ast.parse(module)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        docstring = ast.get_docstring(node)
        length = (node.end_lineno or node.lineno) - node.lineno
        if not docstring or length > 45 or len(docstring) < 20:
            continue
        bare = _without_docstring(node, module)
        if bare is None:
            continue
        code = textwrap.dedent("\n".join(module.splitlines()[node.lineno - 1 : node.end_lineno]))
        yield node.name, f"{node.name}({ast.unparse(node.args)})", docstring, code, bare


def code_pairs(modules: list[str], rng: random.Random) -> Iterator[Conversation]:
    """Requests for functions of the standard library, and requests to describe them."""
    for module in modules:
        for name, signature, docstring, code, bare in functions(module):
            purpose = " ".join(docstring.split("\n\n")[0].split())
            answer = f"```python\n{code if rng.random() < 0.5 else bare}\n```"
            request = rng.choice(WRITE).format(signature=signature, name=name, purpose=purpose)
            if len(answer) <= MAX_ANSWER:
                yield [("user", request), ("assistant", answer)]
            if rng.random() < 0.4 and len(bare) <= MAX_ANSWER:
                yield [("user", rng.choice(DESCRIBE).format(code=bare)), ("assistant", purpose)]


def explanations(documents: list[str], rng: random.Random) -> Iterator[Conversation]:
    """Textbook sections: the title asks, the paragraphs below it answer. A title is a short line with no full stop."""
    for document in documents:
        blocks = document.split("\n\n")
        for index, block in enumerate(blocks[:-1]):
            title = block.strip()
            if "\n" in title or not 8 < len(title) < 70 or title[-1] in ".:;,?!" or not title[0].isupper():
                continue
            answer = ""
            for following in blocks[index + 1 : index + 4]:
                if len(following) < 120:
                    break
                answer += ("\n\n" if answer else "") + following.strip()
            if 200 < len(answer) <= MAX_ANSWER:
                yield [("user", rng.choice(EXPLAIN).format(title=title)), ("assistant", answer)]


def continuations(documents: list[str], rng: random.Random, count: int) -> Iterator[Conversation]:
    """Passages and what follows them, `count` of them, drawn from all documents."""
    paragraphs = [document.split("\n\n") for document in documents]
    paragraphs = [blocks for blocks in paragraphs if len(blocks) >= 8]
    for _ in range(count if paragraphs else 0):
        blocks = rng.choice(paragraphs)
        start = rng.randrange(len(blocks) - 6)
        given = "\n\n".join(blocks[start : start + 2])
        answer = "\n\n".join(blocks[start + 2 : start + 6])
        if 80 < len(given) < 1200 and 150 < len(answer) <= MAX_ANSWER:
            yield [("user", rng.choice(CONTINUE).format(text=given)), ("assistant", answer)]


def conversations(
    texts: dict[str, list[str]], pairs: dict[str, list[dict[str, object]]], seed: int, continued: int = 2500
) -> list[Conversation]:
    """All conversations, shuffled; a third of them open with a system line."""
    rng = random.Random(seed)
    made: list[Conversation] = []
    made += solved_problems(pairs.get("gsm8k_train", []))
    for _ in range(4):
        made += seed_tasks(pairs.get("self_instruct_seed", []))
        made += referenced_questions(pairs.get("mt_bench", []))
    made += code_pairs(texts.get("python_stdlib", []), rng)
    made += explanations(texts.get("openstax_ccby", []), rng)
    for name in ("eltec_eng", "us_speeches"):
        made += continuations(texts.get(name, []), rng, continued)
    rng.shuffle(made)
    return [[("system", rng.choice(SYSTEM_LINES)), *talk] if rng.random() < 0.33 else talk for talk in made]
