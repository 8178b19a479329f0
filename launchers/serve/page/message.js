// One message on the page, with what can be done with it.
import { button, copyText, el, plural } from "./dom.js";
import { MarkdownView } from "./markdown.js";

const ENDINGS = {
  stopped: "You stopped this answer.",
  left: "The page was left before this answer was whole.",
  failed: "This answer failed.",
};
const FINISHES = {
  length: "The answer ends here because it reached the most tokens it may have.",
  context: "The answer ends here because the model's context is full.",
};

const ATTACHED = " (put here for the words it shares with the answer)";

function seconds(milliseconds) {
  return `${(milliseconds / 1000).toFixed(milliseconds < 10_000 ? 1 : 0)} s`;
}

/** Return what an answer took, as one line: tokens, their rate after the first, the wait for the first, the prompt. */
export function costOf(message) {
  const { usage, firstMs, totalMs } = message;
  const parts = [];
  if (usage) {
    parts.push(plural(usage.completion_tokens, "token"));
    const writing = totalMs - firstMs;
    if (usage.completion_tokens > 1 && writing > 0)
      parts.push(`${(((usage.completion_tokens - 1) / writing) * 1000).toFixed(1)} tokens/s`);
  }
  if (firstMs !== undefined) parts.push(`first after ${seconds(firstMs)}`);
  if (Number.isInteger(usage?.prompt_tokens)) {
    const cached = usage.prompt_tokens_details?.cached_tokens;
    const reused = cached ? `, ${cached.toLocaleString("en")} of them cached` : "";
    parts.push(`${plural(usage.prompt_tokens, "token")} read${reused}`);
  }
  return parts.join(" · ");
}

/** The passages that an answer names, each to unfold. */
class Sources {
  constructor(message) {
    this.passages = new Map();
    for (const { n, title, lines, text, is_attached } of message.citations ?? []) {
      const place = lines && `, ${/\D/.test(lines) ? "lines" : "line"} ${lines}`;
      const summary = el("summary", {}, el("span", { class: "number" }, `[${n}]`), " ",
        el("cite", {}, title.replace(/\.$/, "") || "Untitled"), el("span", { class: "lines" }, place, is_attached ? ATTACHED : ""));
      const quote = el("div", { class: "passage", tabindex: "0", role: "group", "aria-label": `Passage ${n}` }, text);
      const passage = el("details", { id: `source-${message.id}-${n}` }, summary, quote);
      if (!this.passages.has(n)) this.passages.set(n, passage);
    }
  }

  get element() {
    if (!this.passages.size) return null;
    return el("section", { class: "sources", "aria-label": "Sources" }, ...this.passages.values());
  }

  /** Return the mark of a citation in the text, which unfolds its passage; null where there is none of that number. */
  mark(n) {
    const passage = this.passages.get(n);
    if (!passage) return null;
    const unfold = (event) => {
      event.preventDefault();
      passage.open = !passage.open;
      if (!passage.open) return;
      passage.scrollIntoView({ block: "nearest" });
      passage.querySelector("summary").focus({ preventScroll: true });
    };
    const mark = el("a", {
      class: "mark", href: `#${passage.id}`, role: "button", onclick: unfold, "aria-label": `Source ${n}`,
      "aria-expanded": "false", "aria-controls": passage.id,
    }, `[${n}]`); // a button would be a box of its own, which lines break around
    mark.addEventListener("keydown", (event) => {
      if (event.key === " ") unfold(event);
    });
    passage.addEventListener("toggle", () => mark.setAttribute("aria-expanded", String(passage.open)));
    return mark;
  }
}

/**
 * An article of the conversation.
 *
 * `actions` has `edit(message, text)`, `regenerate(message)` and `isBusy()`: whether an answer is arriving.
 */
export class MessageView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.body = el("div", { class: "text" });
    this.foot = el("footer", {});
    this.who = el("h2");
    this.element = el("article", { class: `message from-${message.role}` }, this.who, this.body, this.foot);
    this.markdown = message.role === "user" ? null : new MarkdownView(this.body);
    this.shownCitations = undefined;
    this.sources = new Sources({});
  }

  /** Show the message as it is now. */
  show({ isLast, isElsewhere = false }) {
    const { message } = this;
    this.who.textContent = message.role === "user" ? "You" : message.model || "Answer";
    if (this.markdown) this.showAnswer();
    else this.body.textContent = message.text;
    this.element.setAttribute("aria-busy", String(message.state === "running"));
    const state = [message.state, isLast, isElsewhere, this.actions.isBusy(), message.error].join();
    if (state === this.shownState && message.state === "running") return; // the foot keeps the focus
    this.shownState = state;
    this.foot.replaceChildren(...(message.role === "user" ? this.userFoot() : this.answerFoot(isLast, isElsewhere)));
  }

  showAnswer() {
    if (this.message.citations === this.shownCitations && this.cite) this.markdown.show(this.message.text);
    else {
      this.shownCitations = this.message.citations;
      this.sources = new Sources(this.message);
      this.cite = (n) => this.sources.mark(n);
      this.markdown.show(this.message.text, this.cite);
    }
    const isWaiting = this.message.state === "running" && !this.message.text;
    this.element.classList.toggle("is-waiting", isWaiting);
  }

  userFoot() {
    const copy = button("Copy", () => copyText(this.message.text, copy), { class: "quiet" });
    const edit = button("Edit", () => this.edit(), { class: "quiet" });
    return [el("div", { class: "actions" }, copy, this.actions.isBusy() ? null : edit)];
  }

  answerFoot(isLast, isElsewhere) {
    const { message } = this;
    if (message.state === "running")
      return [el("p", { class: "note" }, isElsewhere ? "Another tab is answering." : "Answering …")];
    const hasFailed = message.state === "failed";
    const ending = message.error || ENDINGS[message.state] || FINISHES[message.finish];
    const note = ending && el("p", { class: hasFailed ? "note problem" : "note" }, ending);
    const copy = button("Copy", () => copyText(message.text, copy), { class: "quiet" });
    const isAgain = isLast && !this.actions.isBusy();
    const again = isAgain && button(hasFailed ? "Try again" : "Regenerate", () => this.actions.regenerate(message), {
      class: hasFailed ? "" : "quiet",
    });
    const cost = costOf(message);
    const costLine = cost && el("p", { class: "cost" }, cost);
    const actions = [message.text && copy, again, costLine].filter(Boolean);
    return [this.sources.element, note, el("div", { class: "actions" }, ...actions)].filter(Boolean);
  }

  /** Let the user's message be written anew in its place. */
  edit() {
    const area = el("textarea", { "aria-label": "Your message", rows: "3", dir: "auto" });
    area.value = this.message.text;
    const done = () => {
      form.replaceWith(this.body);
      this.foot.hidden = false;
      this.foot.querySelector("button:last-of-type")?.focus();
    };
    const send = () => {
      const text = area.value.trim();
      if (text) this.actions.edit(this.message, text);
    };
    const form = el("div", { class: "edit", role: "group", "aria-label": "Edit" }, area,
      el("div", { class: "actions" },
        button("Send", send, { class: "primary" }), button("Cancel", done),
        el("p", { class: "hint" }, "Sending removes what follows this message.")));
    form.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        done();
      } else if (event.key === "Enter" && event.target === area && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send();
      }
    });
    this.body.replaceWith(form);
    this.foot.hidden = true;
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }
}
