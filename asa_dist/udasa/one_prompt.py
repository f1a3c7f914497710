"""``udasa.sampling: one_prompt``, as in the paper: the model is asked for N responses at once; its answer is split."""

from __future__ import annotations

import re

# How a model numbers its responses, at the beginning of a line: "**Response 1:**", else "1." or "(1)"
LABELS = (
    re.compile(r"^[ \t*#_(\[]*(?:response|answer)[ \t]*#?(\d+)[ \t*_.:)\]-]*", re.IGNORECASE | re.MULTILINE),
    re.compile(r"^[ \t*#_(\[]*(\d+)[.:)\]][ \t*_]*", re.MULTILINE),
)


def instruction(question: str, num_responses: int) -> str:
    """What ``udasa.sampling: one_prompt`` asks instead of the question, in the paper's words."""
    return (f"You are a professional AI assistant. Please provide {num_responses} distinct responses to the following "
            f"question. Ensure each response is independent. Question: {question}")


def split_responses(text: str) -> list[str]:
    """The responses in an answer to :func:`instruction`, none of them empty.

    They begin at lines labelled 1, 2, 3, …; what stands before the first one is no response. Without at least two such
    labels they are paragraphs.
    """
    for label in LABELS:
        starts: list[re.Match[str]] = []
        for match in label.finditer(text):
            if int(match[1]) == len(starts) + 1:  # other numbers belong to a list within a response
                starts.append(match)
        if len(starts) > 1:
            ends = [match.start() for match in starts[1:]] + [len(text)]
            parts = [text[match.end():end] for match, end in zip(starts, ends, strict=True)]
            break
    else:
        parts = re.split(r"\n\s*\n", text)
    return [part.strip() for part in parts if part.strip()]
