"""Text as people read it: paragraphs that wrap, and everything else as it was."""

from gkd_hf.evaluation.report_text import wrapped

CODE = "```python\nx = 1  # " + "a long comment " * 12 + "\n\ny = 2\n```"
TABLE = "| a |\n|---|\n| " + "word " * 40 + "|"


def test_paragraphs_are_joined_and_broken_anew():
    text = "short\nlines\n" + "word " * 30 + "\n\nnext"
    lines = wrapped(text, 40).split("\n")
    assert lines[0].startswith("short lines word") and lines[-2:] == ["", "next"]
    assert all(len(line) <= 40 for line in lines)
    assert " ".join(wrapped(text, 40).split()) == " ".join(text.split())


def test_code_tables_and_headings_stay():
    text = "\n\n".join(["# A heading " + "that is long " * 12, CODE, TABLE, "<details>\n\n- a list " + "of one " * 20])
    assert wrapped(text, 40) == text


def test_commands_and_links_stay_on_one_line():
    command = "`python scripts/export_onnx.py org/name --out a/very/long/place`"
    link = "[a page with a name](https://example.org/page)"
    assert wrapped(f"Some words before {command} and {link} after it", 30).split("\n") == [
        "Some words before",
        command,
        "and",
        link,
        "after it",
    ]


def test_a_quote_stays_one():
    assert wrapped("> one two three\n> four", 12) == "> one two\n> three four"
