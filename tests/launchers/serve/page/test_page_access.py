"""The page of serve for everybody: by keyboard alone, by screen reader, in dark and light, from 360 pixels to wide."""

import pytest

from tests.launchers.serve.page.site import Gate, Site
from tests.launchers.serve.page.test_page_markup import MARKDOWN
from tests.launchers.serve.page.test_page_talk import CITED
from tests.launchers.serve.page.visit import Tab, Visit


def check(tab: Tab, *, has_all: bool) -> None:
    """Look for what axe-core finds, and for what is wider than the window.

    Args:
        has_all: whether the window is so narrow that each of the page's parts is visited: of colours in the dark too.
    """
    assert tab.violations() == []
    if has_all:
        tab.page.emulate_media(color_scheme="dark")
        assert tab.violations("color-contrast") == []
        tab.page.emulate_media(color_scheme="light")
    assert not tab.scrolls_sideways()


@pytest.mark.parametrize("width", [360, 1440])
def test_nothing_is_in_the_way_of_anybody(visit: Visit, site: Site, width: int) -> None:
    tab = visit.tab(width=width, height=720)
    is_narrow = width < 760
    check(tab, has_all=is_narrow)
    wide = "x" * 300 + " | " + " | ".join(["a long cell"] * 12) + "\n" + "--|" * 13 + "\n\n```\n" + "y" * 400 + "\n```"
    tab.ask("Everything, " + "w" * 200, MARKDOWN + "\nHe asks [1].\n\n" + wide, CITED)
    tab.page.get_by_role("button", name="Source 1").click()
    tab.page.locator("#system summary").click()
    site.answers = [(429, {"message": "full"})]
    tab.send("And a failure")
    tab.see("The server has as many requests as it takes.")
    check(tab, has_all=is_narrow)
    tab.page.get_by_role("button", name="Edit", exact=True).first.click()
    check(tab, has_all=is_narrow)
    tab.page.keyboard.press("Escape")
    if is_narrow:
        tab.click("Conversations")
        check(tab, has_all=is_narrow)
    tab.click("Settings")
    tab.page.fill("#set-seed", "-1")
    check(tab, has_all=is_narrow)
    tab.click("Done")
    if is_narrow:
        tab.click("Close")
    tab.click("More")
    tab.click("Delete")
    check(tab, has_all=is_narrow)
    tab.click("Cancel")
    gate = Gate()
    site.answers = [["Slow", gate]]
    tab.send("And a slow one")
    tab.see("Slow")
    check(tab, has_all=is_narrow)
    gate.open()
    site.key, site.models = "secret", ["tiny", "a-name-of-a-model-that-is-rather-long/and-longer-still"]
    tab.load()
    tab.see("This server asks for an API key.")
    check(tab, has_all=is_narrow)


def test_colours_follow_the_system_and_the_switch(visit: Visit) -> None:
    tab = visit.tab(scheme="dark")

    def lightness() -> int:
        colour = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return int(colour.removeprefix("rgb(").split(",")[0])

    assert lightness() < 50
    tab.page.emulate_media(color_scheme="light")
    assert lightness() > 200
    tab.click("Settings")
    tab.page.get_by_label("Dark").check()
    assert lightness() < 50
    tab.load()
    assert lightness() < 50, "the choice is kept"
    tab.click("Settings")
    tab.page.get_by_label("Light").check()
    tab.page.emulate_media(color_scheme="dark")
    assert lightness() > 200


def focused(tab: Tab) -> str:
    """Return the name of what has the focus."""
    name = "e => e.getAttribute('aria-label') || (e.labels?.[0] ?? e).innerText?.trim() || e.id || e.tagName"
    return str(tab.page.evaluate(f"({name})(document.activeElement)"))


def press_until(tab: Tab, key: str, name: str) -> None:
    """Press a key until something of that name has the focus, and is seen to have it."""
    for _ in range(40):
        tab.page.keyboard.press(key)
        if focused(tab) == name:
            outline = tab.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            frame = tab.page.evaluate("getComputedStyle(document.getElementById('composer')).outlineStyle")
            assert "solid" in (outline, name == "Message" and frame), name
            return
    raise AssertionError(f"{key} never reaches {name}")


def test_the_keyboard_alone_does_everything(visit: Visit, site: Site) -> None:
    tab = visit.tab()
    keyboard = tab.page.keyboard
    assert focused(tab) == "Message", "one can type at once"
    keyboard.type("one")
    keyboard.press("Shift+Enter")
    keyboard.type("two")
    assert tab.page.locator("#prompt").input_value() == "one\ntwo"
    site.answers = [["Well", Gate()], ["Good.\n\n```\ncode\n```"], ["Better."], ["Best."]]
    keyboard.press("Enter")
    tab.see("Well")
    assert focused(tab) == "Message"
    keyboard.press("Escape")
    tab.see("You stopped this answer.")
    press_until(tab, "Shift+Tab", "Regenerate")
    keyboard.press("Enter")
    tab.see("Good.")
    tab.page.locator("#send").wait_for()
    assert focused(tab) == "Message"
    press_until(tab, "Shift+Tab", "Edit")
    keyboard.press("Enter")
    assert focused(tab) == "Your message"
    keyboard.press("Control+a")
    keyboard.type("three")
    keyboard.press("Enter")
    tab.see("Better.")
    tab.page.locator("#send").wait_for()
    assert tab.texts() == ["three", "Better."]

    press_until(tab, "Shift+Tab", "More")
    keyboard.press("Enter")
    press_until(tab, "Tab", "Rename")
    keyboard.press("Enter")
    keyboard.type("Mine")
    keyboard.press("Enter")
    tab.wait_titles("Mine")
    press_until(tab, "Shift+Tab", "New conversation")
    keyboard.press("Enter")
    assert focused(tab) == "Message"
    keyboard.type("four")
    keyboard.press("Enter")
    tab.see("Best.")
    tab.wait_titles("four", "Mine")
    press_until(tab, "Shift+Tab", "Mine")
    keyboard.press("Enter")
    tab.see("Better.")
    press_until(tab, "Tab", "Settings")
    keyboard.press("Enter")
    press_until(tab, "Tab", "Temperature")
    keyboard.type("0.5")
    keyboard.press("Escape")
    assert focused(tab) == "Settings", "the focus comes back"
    press_until(tab, "Tab", "More")
    keyboard.press("Enter")
    press_until(tab, "Tab", "Delete")
    keyboard.press("Enter")
    tab.page.locator("#question[open]").wait_for()
    assert focused(tab) == "Delete"
    keyboard.press("Enter")
    tab.wait_titles("four")


def test_the_first_stop_leads_over_the_list_to_the_message(visit: Visit) -> None:
    tab = visit.tab()
    tab.page.evaluate("document.activeElement.blur()")
    press_until(tab, "Tab", "Skip to the message field")
    tab.page.keyboard.press("Enter")
    assert focused(tab) == "Message"


def test_a_narrow_page_has_the_list_in_a_drawer(visit: Visit, site: Site) -> None:
    tab = visit.tab(width=360, height=640)
    tab.ask("first", "One.")
    assert tab.page.locator("#list").is_hidden()
    tab.click("Conversations")
    assert focused(tab) == "New conversation"
    tab.page.keyboard.press("Escape")
    assert focused(tab) == "Conversations"
    assert tab.page.locator("#list").is_hidden()
    tab.click("Conversations")
    tab.page.keyboard.press("Enter")
    tab.ask("second", "Two.")
    tab.click("Conversations")
    tab.click("first")
    tab.see("One.")
    assert tab.page.locator("#list").is_hidden()
    tab.click("Conversations")
    tab.page.mouse.click(350, 300)
    tab.page.locator("#list").wait_for(state="hidden")


def test_a_screen_reader_hears_sentences_and_not_tokens(visit: Visit, site: Site) -> None:
    tab, gates = visit.tab(), [Gate(), Gate()]
    site.answers = [["The **sea**", " is", gates[0], " wide. It", " has", gates[1], " no", " end"]]
    spoken = tab.page.locator("#spoken")
    assert spoken.get_attribute("aria-live") == "polite"
    tab.send("Tell me.")
    tab.see("is")
    assert spoken.inner_text() == ""
    gates[0].open()
    tab.until("document.getElementById('spoken').textContent === 'The sea is wide.'")
    gates[1].open()
    tab.page.locator("#send").wait_for()
    assert spoken.locator("p").all_text_contents() == ["The sea is wide.", "It has no end", "The answer is whole."]
    assert tab.page.locator("#messages [aria-live], #messages [role=log]").count() == 0
    answer = tab.page.get_by_role("article").last
    assert answer.get_by_role("heading", name="tiny").count() == 1


def test_who_reads_above_is_not_taken_away(visit: Visit, site: Site) -> None:
    tab, gate = visit.tab(height=400), Gate()
    scroll = "document.getElementById('scroll')"
    site.answers = [["line\n\n" * 60, gate, "more\n\n" * 60, "last"]]
    tab.send("Much")
    tab.until(f"{scroll}.scrollTop > 1000")
    tab.page.locator("#scroll").focus()
    tab.page.keyboard.press("Home")
    tab.page.locator("#latest").wait_for()
    tab.until(f"{scroll}.scrollTop < 10")
    gate.open()
    tab.page.locator("#send").wait_for()
    assert tab.page.evaluate(f"{scroll}.scrollTop") < 10
    tab.click("Newest words")
    tab.until(f"{scroll}.scrollHeight - {scroll}.scrollTop - {scroll}.clientHeight < 2")
