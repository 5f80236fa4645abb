"""Chat templates of others: how they end a turn, what they refuse, the date and the arguments they read; chats in the shapes of data sets."""

from __future__ import annotations

import json
import re
import warnings
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ramulus.core.task import Task
from ramulus.run.evaluation.task_sets import ProblemOptions, TaskSets
from ramulus.run.runtime import eos_of
from ramulus.tasks.chat import ChatTemplate, arguments_of, content_text
from ramulus.tasks.examples import WorkedExample, after_examples, worked_examples
from ramulus.tasks.files import File
from ramulus.tasks.problem import Problem, check_ids, render
from ramulus.tasks.sums import Sums
from test_tasks_render import characters
from tiny import build

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }} A:{% else %} {{ m.content }} <eos>{% endif %}{% endfor %}"
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
DATED = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}\n" + PLAIN
THINKING = PLAIN + "{% if enable_thinking is defined and not enable_thinking %}no thoughts\n{% endif %}"


def chatty(template: str) -> Any:
    tokenizer = characters(chat=True, alphabet="abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-=?{}\\ .:\n,")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def text(tokenizer: Any, tokens: tuple[int, ...]) -> str:
    return tokenizer.decode(list(tokens))


@pytest.mark.parametrize(
    ("template", "end"),
    [(CHATML, "<|im_end|>"), (GEMMA, "<|im_end|>"), (LLAMA2, "<eos>"), (PLAIN, None), ("{% broken", None), (DATED, None)],
)
def test_how_a_template_ends_a_turn_ends_answers_and_demonstrations(template: str, end: str | None) -> None:
    tokenizer = chatty(template)
    found = ChatTemplate(tokenizer).turn_end()
    assert (None if found is None else tokenizer.convert_ids_to_tokens(found)) == end
    model = build("qwen2", vocab_size=len(tokenizer))
    model.config.eos_token_id, model.generation_config.eos_token_id = 7, [8, 9]
    wanted = {tokenizer.eos_token_id, 7, 8, 9} | ({found} - {None})
    assert set(eos_of(model, tokenizer)) == wanted
    if template != "{% broken":
        (task,) = render([Problem("a", "one", demonstrations=("two", "two" + (end or "<eos>")))], tokenizer)
        assert [text(tokenizer, shown) for shown in task.demonstrations] == ["two" + (end or "<eos>")] * 2
        (bare,) = render([Problem("a", "one", demonstrations=("two",))], tokenizer, template="{problem}")
        assert text(tokenizer, bare.demonstrations[0]) == "two<eos>", "a plain template has no turns"


def test_what_a_template_refuses_is_one_sentence_that_names_the_problem() -> None:
    tokenizer = chatty(GEMMA)
    problems = [Problem("a", "one"), Problem("b", "two")]
    refused = r"refuses the chat of problem 'a' \(roles: system, user\): System role not supported; leave the system message out"
    with pytest.raises(ValueError, match=refused):
        render(problems, tokenizer, system="be brief")
    twice = Problem("c", "x", messages=({"role": "user", "content": "x"}, {"role": "user", "content": "y"}))
    with pytest.raises(ValueError, match=r"'c' \(roles: user, user\): Conversation roles must alternate .*mend its messages"):
        render([*problems, twice], tokenizer)
    tokenizer.chat_template = "{% for m in messages %}\n{{ m.content }\n{% endfor %}"
    with pytest.raises(ValueError, match=r"has an error in line 2: .*chat_template.jinja"):
        render(problems, tokenizer)
    tokenizer.chat_template = "{{ messages[0].content + 1 }}"
    with pytest.raises(ValueError, match=r"refuses the chat of problem 'a' \(roles: user\): can only concatenate str"):
        render(problems, tokenizer)
    tokenizer.chat_template = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="leaves system messages out"):
        render(problems, tokenizer, system="be brief")


def test_the_date_of_a_template_is_the_one_given() -> None:
    tokenizer, problem = chatty(DATED), [Problem("a", "one")]
    (old,) = render(problem, tokenizer, date="2024-02-29")
    assert text(tokenizer, old.prompt).startswith("29 Feb 2024\n")
    (now,) = render(problem, tokenizer)
    assert text(tokenizer, now.prompt).startswith(datetime.now().strftime("%d %b %Y"))
    (said,) = render(problem, tokenizer, arguments={"date_string": "today"}, date="2024-02-29")
    assert text(tokenizer, said.prompt).startswith("today\n")
    with pytest.raises(ValueError, match="is no day: write it as"):
        render(problem, tokenizer, date="29.2.2024")


def test_arguments_reach_the_template_and_unknown_ones_are_refused() -> None:
    tokenizer, problem = chatty(THINKING), [Problem("a", "one")]
    (task,) = render(problem, tokenizer, arguments={"enable_thinking": False})
    assert text(tokenizer, task.prompt) == "user: one\nassistant: no thoughts\n"
    assert text(tokenizer, render(problem, tokenizer)[0].prompt) == "user: one\nassistant: "
    for name in ("enable_thinkin", "thinking", "add_generation_prompt", "messages"):
        with pytest.raises(ValueError, match=f"template_arguments has '{name}', which the chat template of .* does not read"):
            render(problem, tokenizer, arguments={name: False})
    with pytest.raises(ValueError, match="are for a chat template, and a template was given"):
        render(problem, tokenizer, template="{problem}", arguments={"enable_thinking": False})
    with pytest.raises(ValueError, match="are for a chat template, and this tokenizer has no chat template"):
        render(problem, characters(), arguments={"enable_thinking": False})


def test_columns_that_are_asked_for_hold_whatever_a_run_was_trained_on(tmp_path: Path) -> None:
    """Each by itself; what is not asked for is as in the run's file."""
    line = {"problem": "1+1?", "answer": "2", "question": "2+2?", "final": "4"}
    (tmp_path / "p.jsonl").write_text(json.dumps(line))
    run = SimpleNamespace(tasks=File("train.jsonl", prompt="question", answer="final"), prompt_limit=64, date="", examples=None, weighted=lambda: ())
    run = SimpleNamespace(**vars(run), template=None, system=None, template_arguments=None)
    for asked, trained, expected in (
        ({"prompt": "problem", "answer": "answer"}, run, ("1+1?", "2")),
        ({"prompt": "problem"}, run, ("1+1?", "4")),
        ({}, run, ("2+2?", "4")),
        ({}, None, ("1+1?", "2")),
        ({"answer": "final"}, None, ("1+1?", "4")),
        ({"answer": "none"}, run, ("2+2?", "")),
    ):
        ((_, (task,), _),) = TaskSets((str(tmp_path / "p.jsonl"),), 1, ProblemOptions(**asked), run=trained).read(characters())
        assert (task.text, task.answer) == expected
    run.tasks = File("train.jsonl", prompt="question", answer=None, keep=("final",))
    ((_, (task,), _),) = TaskSets((str(tmp_path / "p.jsonl"),), 1, run=run).read(characters())
    assert (task.answer, task.extra) == ("", {"final": "4"}), "what the run's rewards read"
    with pytest.raises(ValueError, match="all 1 problems are among the worked examples"):
        TaskSets((str(tmp_path / "p.jsonl"),), None, ProblemOptions(examples=str(tmp_path / "p.jsonl"))).read(characters())


def test_arguments_on_the_command_line_of_an_evaluation() -> None:
    tokenizer = chatty(THINKING)
    asked = TaskSets(("chain",), 2, ProblemOptions(template_arguments='{"enable_thinking": false}'))
    ((_, tasks, _),) = asked.read(tokenizer)
    assert all(text(tokenizer, task.prompt).endswith("no thoughts\n") for task in tasks)
    assert arguments_of(None) is None
    for wrong in ("enable_thinking=false", "[1]", "false"):
        with pytest.raises(ValueError, match="is a JSON object such as"):
            arguments_of(wrong)
    tokenizer.chat_template = DATED
    ((_, tasks, _),) = TaskSets(("chain",), 1, ProblemOptions(date="2024-02-29")).read(tokenizer, "2020-01-01")
    assert text(tokenizer, tasks[0].prompt).startswith("29 Feb 2024\n")
    ((_, tasks, _),) = TaskSets(("chain",), 1).read(tokenizer, "2020-01-01")
    assert text(tokenizer, tasks[0].prompt).startswith("01 Jan 2020\n")


@pytest.mark.parametrize(
    ("content", "want"),
    [("x", "x"), (None, ""), ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"), (["a", {"text": "b"}], "ab"), ([], "")],
)
def test_content_in_parts_of_text_is_joined(content: Any, want: str) -> None:
    assert content_text(content, "row 1") == want


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": "x.png"}], "'image_url'"),
        ([{"type": "text", "text": None}], "'text'"),
        ([{"type": "input_audio", "text": "a"}], "'input_audio'"),
        (7, "'int'"),
    ],
)
def test_other_parts_are_refused_by_their_type(content: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=f"row 1: a message holds a part of type {kind}"):
        content_text(content, "row 1")
    with pytest.raises(ValueError, match=f"a message holds a part of type {kind}"):
        render([Problem("a", "x", messages=({"role": "user", "content": content},))], chatty(PLAIN))


def rows(tmp_path: Path, *found: dict) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, found)))
    return str(path)


def test_a_chat_that_ends_with_an_answer_is_no_prompt_but_may_be_a_demonstration(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "2?"}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "It is 3"}]}]
    path = rows(tmp_path, {"messages": chat, "answer": "3"})
    with pytest.raises(ValueError, match=r"line 1: the chat in column 'messages' ends with an assistant's turn.*tasks.demonstration=messages"):
        File(path, prompt="messages")()
    (problem,) = File(path, prompt="messages", demonstration="messages")()
    assert (problem.text, problem.demonstrations) == ("1+2?", ("It is 3",))
    assert problem.messages == ({"role": "user", "content": "1+2?"},)
    tokenizer = chatty(CHATML)
    (task,) = render([problem], tokenizer)
    assert "It is 3" not in text(tokenizer, task.prompt)
    again = rows(tmp_path, {"messages": [*chat, {"role": "assistant", "content": "or 4"}], "answer": "3"})
    with pytest.raises(ValueError, match=r"ends with an assistant's turn"):
        render(File(again, prompt="messages", demonstration="messages")(), tokenizer)
    with pytest.raises(ValueError, match=r"problem 'a' ends with an assistant's turn"):
        render([Problem("a", "x", messages=tuple(chat))], tokenizer)
    open_ended = rows(tmp_path, {"messages": chat[:1], "answer": "3"})
    with pytest.raises(ValueError, match="a demonstration is text"):
        File(open_ended, prompt="messages", demonstration="messages")()
    longer = [*chat, {"role": "user", "content": "and 1+3?"}]
    (problem,) = File(rows(tmp_path, {"messages": longer, "answer": "4"}), prompt="messages")()
    assert [m["role"] for m in problem.messages] == ["user", "assistant", "user"], "turns in the middle stay"


DEAF = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
SYSTEM, ASKED, SAID, AGAIN = ({"role": r, "content": c} for r, c in zip(("system", "user", "assistant", "user"), ("in a box", "1+1?", "2", "and 3?")))


@pytest.mark.parametrize(
    ("template", "form", "chat", "refused"),
    [
        (None, None, (SYSTEM, ASKED), "'in a box' of the role 'system', but only .* show it, and this tokenizer has no chat template"),
        (PLAIN, "q: {problem}", (SYSTEM, ASKED), "and a template was given: put it before {problem} in template="),
        (PLAIN, "q: {problem}", (ASKED, SAID, AGAIN), "'2' of the role 'assistant'"),
        (None, None, (SAID, AGAIN), "'2' of the role 'assistant'"),
        (None, None, (ASKED, {"role": "tool", "content": "2"}, AGAIN), "of the role 'tool'"),
        (DEAF, None, (SYSTEM, ASKED), "'in a box' of the role 'system', but the chat template of .* leaves it out"),
        ("{{ messages[-1].content }}", None, (ASKED, SAID, AGAIN), "'1+1?' of the role 'user', but the chat template of .* leaves it out"),
        (PLAIN, None, (SYSTEM, ASKED, SAID, AGAIN), None),
        (DEAF, None, (ASKED, SAID, AGAIN), None),
        (DEAF, None, (SYSTEM | {"content": ""}, ASKED), None),
        (None, "q: {problem}", (ASKED, AGAIN), None),
    ],
)
def test_a_turn_that_would_be_left_out_is_refused(tmp_path: Path, template: str | None, form: str | None, chat: tuple, refused: str | None) -> None:
    tokenizer = chatty(template) if template else characters()
    problems = File(rows(tmp_path, {"messages": chat, "answer": "4"}), prompt="messages")()
    if refused is None:
        render(problems, tokenizer, form)
        return
    with pytest.raises(ValueError, match="problem 'rows-0' has the message .*" + re.escape(refused).replace(r"\.\*", ".*")):
        render(problems, tokenizer, form)
    alone = File(rows(tmp_path, {"messages": chat, "answer": "4"}), prompt=f"messages.{len(chat) - 1}.content")()
    assert len(render(alone, tokenizer, form)) == 1, "as the sentence says"


def test_worked_turns_before_a_text_of_its_own_are_left_out_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="the worked examples in the chats of 3 problems are left out, as only a chat template shows them"):
        tasks = render(Sums(3)(), characters())
    assert len(tasks) == 3


@pytest.mark.parametrize("name", ["tool_calls", "reasoning_content", "images"])
def test_what_a_message_holds_beside_its_text_is_not_lost(tmp_path: Path, name: str) -> None:
    turn = SAID | {"content": None, name: [{"id": 1}]}
    path = rows(tmp_path, {"messages": [ASKED, turn, AGAIN], "shown": [turn], "problem": "1+1?", "answer": "4"})
    with pytest.raises(ValueError, match=rf"line 1: a message of the role 'assistant' has '{name}', .*leave such rows out"):
        File(path, prompt="messages")()
    with pytest.raises(ValueError, match=rf"line 1: a message of the role 'assistant' has '{name}'"):
        File(path, demonstration="shown")()
    empty = rows(tmp_path, {"messages": [ASKED, SAID | {name: None}, AGAIN | {name: []}], "answer": "4"})
    assert len(File(empty, prompt="messages")()) == 1


def test_a_prompt_that_goes_with_images_is_refused(tmp_path: Path) -> None:
    verl = {"prompt": [{"role": "user", "content": "<image>what?"}], "reward_model": {"ground_truth": "4"}, "images": [{"bytes": "x"}]}
    for row, form in ((verl, {}), (verl, {"prompt": "prompt"}), ({"problem": "<image>what?", "answer": "4", "image": "x.png"}, {})):
        with pytest.raises(ValueError, match=r"line 1: the prompt goes with the images? of column 'images?', and only text can be read"):
            File(rows(tmp_path, row), **form)()
    for row in (verl | {"images": []}, {"problem": "what?", "answer": "4", "image": "ubuntu"}, {"problem": "<image>?", "answer": "4"}):
        assert len(File(rows(tmp_path, row))()) == 1


def test_an_example_of_several_turns_is_refused(tmp_path: Path) -> None:
    path = rows(tmp_path, {"messages": [ASKED, SAID, AGAIN, SAID], "answer": "4"})
    with pytest.raises(ValueError, match="the example 'rows-0' is a chat of several turns"):
        worked_examples(File(path, prompt="messages", demonstration="messages")(), None)
    assert len(worked_examples(Sums(2)(), None)) == 2


def test_the_name_and_the_call_of_a_message_reach_the_chat_template(tmp_path: Path) -> None:
    answer = {"role": "tool", "content": "4", "name": "sum", "tool_call_id": "c1", "weight": 0.5}
    [problem] = File(rows(tmp_path, {"messages": [ASKED, answer, AGAIN | {"name": "Ann"}], "answer": "4"}), prompt="messages")()
    assert problem.messages is not None
    kept = [sorted(turn.keys() - {"content", "role"}) for turn in problem.messages]
    assert kept == [[], ["name", "tool_call_id"], ["name"]]


def test_examples_whose_system_message_the_problems_lack_are_said(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    [alike] = worked_examples(File(rows(tmp_path, {"messages": [system, ASKED], "answer": "4"}), prompt="messages")(), None)
    asked, bare = Problem("a", "x", messages=(system, {"role": "user", "content": "x"})), Problem("b", "y")
    with pytest.warns(UserWarning, match=r"the system messages of 1 worked examples, the first 'Be brief\.', are not shown"):
        after_examples([asked, bare], [alike], None, chat=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after_examples([asked], [alike], None, chat=True)
        after_examples([asked, bare], [WorkedExample("q", "s")], None, chat=True)


def test_a_message_without_a_role_is_refused() -> None:
    with pytest.raises(ValueError, match="a message has a role and a content"):
        render([Problem("a", "x", messages=({"content": "x"},))], chatty(PLAIN))


def test_tokens_that_the_model_has_no_row_for_are_named() -> None:
    tokenizer = chatty(PLAIN)
    high = tokenizer.convert_tokens_to_ids("<|im_end|>")
    fine, prompt, shown = Task("a", (1, 2), "a"), Task("b", (1, high), "b"), Task("c", (1,), "c", demonstrations=((1,), (2, high)))
    check_ids([fine], tokenizer, high)
    check_ids([fine, prompt, shown], tokenizer, high + 1)
    for task, what in ((prompt, "prompt of problem 'b'"), (shown, "demonstration of problem 'c'")):
        said = rf"the {what} holds the token '<\|im_end\|>' with id {high}, but the model has embeddings for {high} tokens"
        with pytest.raises(ValueError, match=said):
            check_ids([fine, task], tokenizer, high)


@pytest.mark.parametrize("where", ["text", "chat", "demonstration"])
def test_half_a_character_is_refused_by_name(where: str) -> None:
    torn = json.loads('"1+2 \\ud83d"')
    problem = {
        "text": Problem("a", torn),
        "chat": Problem("a", "1+2", messages=({"role": "user", "content": torn},)),
        "demonstration": Problem("a", "1+2", demonstrations=(torn,)),
    }[where]
    with pytest.raises(ValueError, match=r"problem 'a' holds half of a character, '1\+2 .ud83d', which no tokenizer reads"):
        render([Problem("b", "1+2"), problem], chatty(PLAIN))


def test_an_example_that_holds_the_templates_own_mark_is_shown_as_it_is() -> None:
    shown = [WorkedExample("a {problem} b", "{problem} c")]
    problems, template, before = after_examples([Problem("a", "1+2=?")], shown, "Q: {problem} A:", chat=False)
    tokenizer = chatty(PLAIN)
    (task,) = render(problems, tokenizer, template, before=before)
    assert text(tokenizer, task.prompt) == "Q: a {problem} b A: {problem} c\n\nQ: 1+2=? A:"
