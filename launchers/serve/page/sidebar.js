// The list of conversations, its search, and the drawer that it is on narrow screens.
import { button, byId, el, notify } from "./dom.js";
import { includesText, titleOf } from "./records.js";
import { storageProblem } from "./store.js";

const NARROW = "(max-width: 760px)";

/** Shows the conversations of a store. `select(id)` is called for the one that is chosen. */
export class Sidebar {
  constructor(store, select) {
    this.store = store;
    this.select = select;
    this.currentId = "";
    this.turn = 0;
    this.narrow = matchMedia(NARROW);
    this.narrow.addEventListener("change", () => this.close());
    byId("search").addEventListener("input", () => this.show());
    this.timer = 0;
    byId("open-sidebar").addEventListener("click", () => this.open());
    byId("scrim").addEventListener("click", () => this.close());
    byId("close-sidebar").addEventListener("click", () => this.close());
  }

  get isDrawerOpen() {
    return this.narrow.matches && byId("sidebar").classList.contains("is-open");
  }

  open() {
    byId("sidebar").classList.add("is-open");
    byId("scrim").hidden = false;
    byId("main").inert = true;
    byId("new").focus();
  }

  /** Close the drawer; on wide screens the list stays where it is. */
  close() {
    const wasOpen = this.isDrawerOpen;
    byId("sidebar").classList.remove("is-open");
    byId("scrim").hidden = true;
    byId("main").inert = false;
    if (wasOpen) byId("open-sidebar").focus();
  }

  /** Show the list soon, once for many changes. */
  showSoon() {
    this.timer ||= setTimeout(() => {
      this.timer = 0;
      this.show();
    }, 300);
  }

  /** Read the store and show what the search finds. */
  async show() {
    const turn = ++this.turn; // an older reading may end after a newer one
    const words = byId("search").value.trim();
    let conversations;
    try {
      conversations = await this.store.all();
    } catch (error) {
      return notify(storageProblem(error), { isError: true });
    }
    if (turn !== this.turn) return;
    const found = words ? conversations.filter((each) => includesText(each, words)) : conversations;
    const focused = document.activeElement?.dataset?.conversation;
    byId("list").replaceChildren(...found.map((each) => this.entry(each)));
    byId("list-note").textContent = found.length
      ? ""
      : words ? "No conversation has these words." : "Conversations stay in this browser.";
    if (focused) byId("list").querySelector(`[data-conversation="${CSS.escape(focused)}"]`)?.focus();
  }

  entry(conversation) {
    const title = titleOf(conversation);
    const choose = () => {
      this.close();
      this.select(conversation.id);
    };
    return el("li", {}, button(title, choose, {
      title, "data-conversation": conversation.id, "aria-current": conversation.id === this.currentId ? "true" : null,
    }));
  }

  /** Mark the conversation that is open. */
  mark(id) {
    this.currentId = id;
    for (const each of byId("list").querySelectorAll("button")) {
      if (each.dataset.conversation === id) each.setAttribute("aria-current", "true");
      else each.removeAttribute("aria-current");
    }
  }
}
