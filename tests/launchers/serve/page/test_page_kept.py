"""Conversations on the page of serve stay in the browser: over reloads, beside other tabs, in files and out of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.launchers.serve.page.site import Gate, Site
from tests.launchers.serve.page.visit import Tab, Visit

FORMAT = {"format": "trimaran-conversations", "version": 1}


def conversations_of(tab: Tab, tmp_path: Path) -> list[dict[str, Any]]:
    """Export all, and return what the file holds."""
    with tab.page.expect_download() as download:
        tab.click("Export all")
    file = tmp_path / "exported.json"
    download.value.save_as(file)
    content = json.loads(file.read_text(encoding="utf-8"))
    assert {name: content[name] for name in FORMAT} == FORMAT
    return list(content["conversations"])


def import_text(tab: Tab, text: str) -> None:
    """Choose a file with that text."""
    file = {"name": "talk.json", "mimeType": "application/json", "buffer": text.encode()}
    tab.page.set_input_files("#import-file", files=[file])  # type: ignore[list-item]


def import_conversations(tab: Tab, *conversations: Any) -> None:
    """Choose a file with these conversations."""
    import_text(tab, json.dumps({**FORMAT, "conversations": conversations}))


def test_a_reload_in_mid_answer_keeps_what_came(visit: Visit, site: Site) -> None:
    tab = visit.tab()
    site.answers = [["Half of ", "it", Gate()], ["All of it."]]
    tab.send("Say it.")
    tab.see("Half of it")
    tab.load()
    tab.see("The page was left before this answer was whole.")
    assert tab.texts() == ["Say it.", "Half of it"]
    site.wait_left(1)
    tab.click("Regenerate")
    tab.see("All of it.")
    tab.load()
    assert tab.texts() == ["Say it.", "All of it."]


def test_conversations_are_listed_found_renamed_and_deleted(visit: Visit, site: Site) -> None:
    tab = visit.tab()
    tab.ask("About the sea", "It is wide.")
    tab.click("New conversation")
    tab.ask("About the hills", "They are steep.")
    tab.wait_titles("About the hills", "About the sea")
    tab.page.fill("#search", "WIDE")
    tab.wait_titles("About the sea")
    tab.page.fill("#search", "nothing such")
    tab.see("No conversation has these words.")
    tab.page.fill("#search", "")
    tab.wait_titles("About the hills", "About the sea")
    tab.click("About the sea")
    tab.see("It is wide.")
    tab.click("More")
    tab.click("Rename")
    tab.page.keyboard.type("Waves")
    tab.page.keyboard.press("Enter")
    tab.wait_titles("About the hills", "Waves")
    tab.load()
    assert tab.titles() == ["About the hills", "Waves"]
    assert tab.page.locator("#title").inner_text() == "Waves"
    tab.click("More")
    tab.click("Delete")
    tab.click("Cancel")
    assert tab.titles() == ["About the hills", "Waves"]
    tab.click("More")
    tab.click("Delete")
    tab.click("Delete", within="#question")
    tab.wait_titles("About the hills")
    tab.load()
    assert tab.titles() == ["About the hills"]


def test_an_answer_goes_on_while_another_conversation_is_open(visit: Visit, site: Site) -> None:
    tab, gate = visit.tab(), Gate()
    site.answers = [["Slow", gate, " and steady."], ["Quick."]]
    tab.send("first")
    tab.see("Slow")
    tab.click("New conversation")
    tab.ask("second")
    assert tab.texts() == ["second", "Quick."]
    gate.open()
    tab.click("first")
    tab.see("Slow and steady.")
    tab.load()
    assert tab.texts() == ["first", "Slow and steady."]


def test_two_tabs_see_each_other_and_lose_nothing(visit: Visit, site: Site, tmp_path: Path) -> None:
    one, gate = visit.tab(), Gate()
    site.answers = [["Well", gate, ", yes."]]
    one.send("Is it so?")
    one.see("Well")
    two = visit.tab()
    two.wait_titles("Is it so?")
    two.click("Is it so?")
    two.see("Another tab is answering.")
    assert two.page.locator("#send").is_disabled()
    gate.open()
    two.see("Well, yes.")
    two.page.locator("#send:enabled").wait_for()
    two.ask("Why?", "Because.")
    one.see("Because.")
    assert one.texts() == two.texts() == ["Is it so?", "Well, yes.", "Why?", "Because."]

    two.page.get_by_role("button", name="Edit", exact=True).last.click()  # what is typed there stays
    one.ask("How?", "So.")
    two.page.keyboard.type(" Tell.")
    two.page.keyboard.press("Enter")
    two.see("is kept as a copy")
    two.see("All right.")
    one.page.bring_to_front()
    one.wait_titles("Is it so? (copy)", "Is it so?")
    kept = {each["title"]: [m["text"] for m in each["messages"]] for each in conversations_of(one, tmp_path)}
    assert kept == {
        "": ["Is it so?", "Well, yes.", "Why?", "Because.", "How?", "So."],
        "Is it so? (copy)": ["Is it so?", "Well, yes.", "Why? Tell.", "All right."],
    }

    two.page.bring_to_front()
    two.click("Is it so?")
    two.see("So.")
    one.page.bring_to_front()
    one.click("More")
    one.click("Delete")
    one.click("Delete", within="#question")
    two.see("This conversation was deleted in another tab.")
    two.wait_titles("Is it so? (copy)")


@pytest.mark.parametrize("script", ["", "Object.defineProperty(Navigator.prototype, 'locks', {value: undefined})"])
def test_where_the_answering_tab_is_closed_another_one_goes_on(visit: Visit, site: Site, script: str) -> None:
    """Without locks, as on addresses that browsers do not call secure, tabs ask each other."""
    one = visit.tab(script=script)
    site.answers = [["What came", Gate()], ["All of it."]]
    one.send("Is it so?")
    one.see("What came")
    two = visit.tab(script=script)
    two.click("Is it so?")
    two.see("Another tab is answering.")
    one.page.close()
    two.see("The page was left before this answer was whole.")
    assert two.texts() == ["Is it so?", "What came"]
    two.click("Regenerate")
    two.see("All of it.")


def test_what_is_exported_comes_back_in_another_browser(visit: Visit, site: Site, tmp_path: Path) -> None:
    tab = visit.tab()
    tab.page.locator("#system summary").click()
    tab.page.fill("#system-text", "Be kind.")
    tab.ask("Straße, İstanbul, 学", "Yes “indeed”.")
    exported = conversations_of(tab, tmp_path)
    assert exported[0]["system"] == "Be kind."
    import_conversations(tab, *exported)
    tab.see("Imported: 0 of 1; the others are here already.")
    exported[0]["messages"][1]["text"] = "No."
    import_conversations(tab, *exported)
    tab.see("Imported: 1 of 1.")
    tab.wait_titles("Straße, İstanbul, 学", "Straße, İstanbul, 学")
    assert sorted(each["messages"][1]["text"] for each in conversations_of(tab, tmp_path)) == ["No.", "Yes “indeed”."]
    tab.click("More")
    with tab.page.expect_download() as download:
        tab.click("Export", within="#menu")
    assert download.value.suggested_filename == "Straße-İstanbul-学.json"


def test_a_file_that_holds_something_else_is_refused_with_its_place(visit: Visit) -> None:
    tab = visit.tab()
    good = {"messages": [{"role": "user", "text": "hello"}]}
    import_text(tab, "{")
    tab.see("The file is no JSON")
    import_text(tab, '[{"role": "user"}]')
    tab.see('its "format" has to be "trimaran-conversations"')
    for wrong, sentence in (
        (7, "conversations[1] has to be an object"),
        ({"messages": {}}, "conversations[1].messages has to be a list"),
        ({"messages": [{"role": "tool", "text": ""}]}, 'messages[0].role has to be "user" or "assistant"'),
        ({"messages": [{"role": "user", "text": 7}]}, "conversations[1].messages[0].text has to be a text"),
        ({"messages": [], "title": {}}, "conversations[1].title has to be a text"),
        ({"messages": [], "id": "../x"}, "conversations[1].id has to be"),
        ({"messages": [], "id": 7}, "conversations[1].id has to be"),
        ({"messages": [], "updated": "now"}, "conversations[1].updated has to be a time"),
    ):
        import_conversations(tab, good, wrong)
        tab.see(f"Nothing is imported: in the file, {sentence}" if "conv" in sentence else sentence)
    assert tab.titles() == []
    import_conversations(tab, good)
    tab.wait_titles("hello")


def test_a_browser_that_is_full_or_keeps_nothing_says_so(visit: Visit, site: Site) -> None:
    tab = visit.tab()
    session = tab.page.context.new_cdp_session(tab.page)
    session.send("Storage.overrideQuotaForOrigin", {"origin": site.url, "quotaSize": 1})
    tab.ask("Is there room?", "No matter. " * 10_000)
    tab.see("The browser has no room for more conversations.")
    assert tab.texts()[-1].startswith("No matter."), "the conversation goes on"
    session.send("Storage.overrideQuotaForOrigin", {"origin": site.url})
    other = visit.tab(script="Object.defineProperty(window, 'indexedDB', {value: undefined})")
    other.see("The browser can't keep conversations")
    other.ask("Still?", "Still.")
    other.wait_titles("Still?")
