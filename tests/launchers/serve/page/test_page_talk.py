"""Talking on the page of serve: by real clicks and keys, with answers that arrive, are stopped, changed and fail."""

from typing import Any

from tests.launchers.serve.page.site import Cut, Gate, Site
from tests.launchers.serve.page.visit import Visit

CITED: dict[str, Any] = {
    "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}],
    "trimaran": {
        "citations": [
            {"n": 1, "title": "Hamlet, Act III.", "lines": [64, 66], "text": "To be, or not to be:\nthe question"},
            {
                "n": 2,
                "title": "Hamlet, Act V",
                "lines": [358, 358],
                "text": "The rest is silence.",
                "is_attached": True,
            },
        ]
    },
}


def test_an_answer_is_shown_as_it_arrives_with_what_it_took(visit: Visit, site: Site) -> None:
    tab, gate = visit.tab(), Gate()
    site.answers = [["Half of ", "it", gate, " and the rest."]]
    tab.send("Say it.")
    tab.see("Half of it")
    assert tab.page.locator(".message h2").all_inner_texts() == ["You", "tiny"]
    assert tab.page.locator("#send").is_hidden()
    gate.open()
    tab.see("Half of it and the rest.")
    tab.page.locator("#send").wait_for()
    cost = tab.page.locator(".cost").inner_text()
    assert cost.startswith("3 tokens · ")
    assert "tokens/s · first after" in cost
    assert cost.endswith("7 tokens read")
    request = site.requests[0]
    assert request["messages"] == [{"role": "user", "content": "Say it."}]
    assert request["model"] == "tiny"
    assert request["stream"] is True
    assert request["stream_options"] == {"include_usage": True}
    assert "temperature" not in request, "what is not set is the server's"
    tab.ask("And again?")
    assert [each["role"] for each in site.requests[1]["messages"]] == ["user", "assistant", "user"]


def test_an_answer_is_stopped_by_button_and_key_and_the_server_sees_the_client_go(visit: Visit, site: Site) -> None:
    tab = visit.tab()
    site.answers = [["What came", Gate()], ["What came then", Gate()]]
    tab.send("Go on for ever.")
    tab.see("What came")
    tab.click("Stop")
    tab.see("You stopped this answer.")
    assert tab.texts()[-1] == "What came"
    tab.until("document.activeElement.id === 'prompt'")
    tab.send("Go on.")
    tab.see("What came then")
    tab.page.keyboard.press("Escape")
    tab.page.locator("#send").wait_for()
    tab.ask("Why?")
    contents = [each["content"] for each in site.requests[-1]["messages"]]
    assert contents == ["Go on for ever.", "What came", "Go on.", "What came then", "Why?"]
    site.wait_left(2)


def test_an_answer_is_made_again_and_an_edited_message_cuts_what_follows(visit: Visit, site: Site) -> None:
    tab = visit.tab()
    tab.ask("one", "first")
    tab.ask("two", "second")
    site.answers = [["third"]]
    tab.click("Regenerate")
    tab.see("third")
    tab.page.locator("#send").wait_for()
    assert tab.texts() == ["one", "first", "two", "third"]
    assert [each["content"] for each in site.requests[-1]["messages"]] == ["one", "first", "two"]
    tab.page.get_by_role("button", name="Edit", exact=True).first.click()
    tab.page.keyboard.press("Escape")
    assert tab.texts() == ["one", "first", "two", "third"]
    site.answers = [["fourth"]]
    tab.page.get_by_role("button", name="Edit", exact=True).first.click()
    tab.page.keyboard.type(", changed")
    tab.page.keyboard.press("Enter")
    tab.see("fourth")
    assert tab.texts() == ["one, changed", "fourth"]
    assert [each["content"] for each in site.requests[-1]["messages"]] == ["one, changed"]
    tab.click("Edit")
    site.answers = [["fifth", Gate()]]
    tab.send("two")
    tab.see("fifth")
    tab.click("Send", within=".edit")
    tab.see("An answer is arriving: stop it or let it end, then send the change.")
    assert len(site.requests) == 5


def test_answers_and_code_are_copied_with_and_without_the_clipboard_of_secure_pages(visit: Visit, site: Site) -> None:
    tab = visit.tab()
    answer = "See **this**:\n\n```python\nprint('<b>')\n```\n"
    tab.ask("code", answer)
    tab.click("Copy", within=".code")
    tab.see("Copied")
    assert tab.page.evaluate("navigator.clipboard.readText()") == "print('<b>')"
    tab.click("Copy", within=".from-assistant footer")
    tab.until("text => navigator.clipboard.readText().then(found => found === text)", answer)
    older = visit.tab(script="Object.defineProperty(Navigator.prototype, 'clipboard', {value: undefined})")
    older.ask("by the older way", "old")
    older.click("Copy", within=".from-assistant footer")
    older.see("Copied")
    older.page.locator("#prompt").focus()
    older.page.keyboard.press("Control+v")
    assert older.page.locator("#prompt").input_value() == "old"


def test_settings_and_system_prompts_are_sent_and_kept(visit: Visit, site: Site) -> None:
    site.models = ["tiny", "tall"]
    tab = visit.tab()
    tab.click("Settings")
    values = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_tokens": 64, "seed": 7,
        "presence_penalty": -0.5, "frequency_penalty": 1,
    }  # fmt: skip
    for name, value in values.items():
        tab.page.fill(f"#set-{name}", str(value))
    tab.page.fill("#set-system", "Be brief.")
    tab.page.fill("#set-temperature", "9")
    tab.see("Temperature has to be a number from 0 to 2.")
    tab.click("Done")
    tab.page.select_option("#model", "tall")
    tab.load()
    tab.click("New conversation")
    tab.ask("hello")
    request = site.requests[0]
    assert {name: request[name] for name in values} == values, "a wrong value does not take the place of a right one"
    assert request["model"] == "tall"
    assert request["messages"][0] == {"role": "system", "content": "Be brief."}
    tab.page.locator("#system summary").click()
    tab.page.fill("#system-text", "Be long.")
    tab.ask("again")
    assert site.requests[1]["messages"][0] == {"role": "system", "content": "Be long."}


def test_passages_that_an_answer_names_unfold(visit: Visit, site: Site) -> None:
    tab = visit.tab()
    tab.ask("What does he ask?", "Whether to be [1], and then silence [2]. Not [3] nor x[1](http://a.b).", CITED)
    assert tab.page.locator(".sources summary").all_inner_texts() == [
        "[1] Hamlet, Act III, lines 64–66",
        "[2] Hamlet, Act V, line 358 (put here for the words it shares with the answer)",
    ]
    mark = tab.page.get_by_role("button", name="Source 2")
    assert mark.get_attribute("aria-expanded") == "false"
    mark.focus()
    tab.page.keyboard.press("Enter")
    tab.see("The rest is silence.")
    tab.until("document.querySelectorAll('.mark')[1].getAttribute('aria-expanded') === 'true'")
    tab.page.get_by_role("button", name="Source 1").click()
    tab.see("the question")
    assert tab.page.locator(".mark").count() == 2, "no mark without its passage"
    tab.load()
    assert tab.page.locator(".sources details").count() == 2
    checked = {"text": "To be [1].", "citations": CITED["trimaran"]["citations"]}
    tab.ask("And checked?", "To be [7].", {**CITED, "trimaran": checked})
    assert tab.texts()[-1] == "To be\xa0[1]."


FAILURES: tuple[tuple[object, str], ...] = (
    (
        (429, {"message": "full"}, {"retry-after": "3"}),
        "The server has as many requests as it takes. Try again in 3 seconds.",
    ),
    (
        (400, {"message": "120 tokens of at most 64", "code": "context_length_exceeded"}),
        "The conversation is longer than the model can read. 120 tokens of at most 64. Shorten",
    ),
    ((400, {"message": "The model has no chat template."}), "refused the request. The model has no chat template."),
    ((503, {"message": "It is ending"}), "The server takes no requests now. It is ending."),
    ((500, {}), "The server failed."),
    ([{"error": {"message": "A rank has ended"}}], "failed in the middle of the answer. A rank has ended."),
)


def test_a_failure_is_a_sentence_with_a_way_to_try_again(visit: Visit, site: Site) -> None:
    tab = visit.tab()
    for number, (answer, sentence) in enumerate(FAILURES):
        site.answers = [answer, [f"Now {number} works."]]
        tab.send("Please.")
        tab.see(sentence)
        tab.click("Try again")
        tab.see(f"Now {number} works.")
        tab.page.locator("#send").wait_for()
        assert tab.page.locator("#messages").get_by_text(sentence).count() == 0
    assert len(site.requests) == 2 * len(FAILURES)
    assert site.requests[-1] == site.requests[-2]


def test_where_the_server_goes_the_page_says_so_and_keeps_what_came(visit: Visit, site: Site) -> None:
    tab, gate = visit.tab(), Gate()
    site.answers = [["What came", gate, Cut()]]
    tab.send("Please.")
    tab.see("What came")
    gate.open()
    tab.see("The connection to the server is lost. It may have ended; what came is kept.")
    assert tab.texts()[-1] == "What came"
    site.models = []
    tab.load()
    tab.page.context.set_offline(True)
    tab.send("Anybody?")
    tab.see("The server can't be reached.")
    tab.page.context.set_offline(False)
    site.models = ["late"]
    tab.click("Try again", within="#messages")
    tab.see("All right.")
    assert site.requests[-1]["model"] == "late"
    tab.page.get_by_role("heading", name="late").wait_for()


def test_a_key_is_asked_for_and_kept_for_the_tab_alone(visit: Visit, site: Site) -> None:
    site.key = "right"
    tab = visit.tab()
    tab.see("This server asks for an API key.")
    assert tab.page.evaluate("document.activeElement.id") == "key"
    tab.page.keyboard.type("wrong")
    tab.page.keyboard.press("Enter")
    tab.see("The server does not accept this API key.")
    tab.page.fill("#key", "right")
    tab.click("Use key")
    tab.page.locator("#key-form").wait_for(state="hidden")
    tab.ask("hello", "Good day.")
    tab.load()
    assert tab.page.locator("#key-form").is_hidden()
    assert tab.page.evaluate("JSON.stringify(localStorage)").find("right") < 0
    site.key = "new"
    site.answers = [["At last."]]
    tab.send("And now?")
    tab.see("does not accept the API key")
    tab.page.fill("#key", "new")
    tab.page.locator("#key").press("Enter")
    tab.see("At last.")
    assert tab.texts() == ["hello", "Good day.", "And now?", "At last."]
    visit.tab().see("This server asks for an API key.")


def test_a_twin_says_that_it_imitates_and_names_its_works(visit: Visit, site: Site) -> None:
    works = [f"Play {number}" for number in range(7)]
    site.twin = {"author": "William <img src=x onerror=alert(1)>", "character": "Hamlet", "works": works}
    tab = visit.tab()
    shown = tab.page.locator("#twin").inner_text()
    assert shown.startswith("This model imitates Hamlet, as William <img src=x onerror=alert(1)> wrote the part: ")
    assert "never said by anyone, unless it is quoted from a passage" in shown
    assert shown.endswith("It answers from Play 0; Play 1; Play 2; Play 3; Play 4 and 2 more.")
    site.twin = {"author": 7, "works": "x"}
    assert visit.tab().page.locator("#twin").inner_text() == ""
