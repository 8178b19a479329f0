// Answers that are arriving: each fills its message, is saved as it grows, and is read out sentence by sentence.
import { ApiError, streamAnswer } from "./api.js";
import { say } from "./dom.js";
import { requestMessages } from "./records.js";

const SAVE_EVERY_MS = 400;
const SENTENCE_END = /[.!?…]["'”’)\]]*\s+|\n+/g;

function withoutMarks(text) {
  return text.replace(/\[([^\]]{0,500})\]\([^)]{0,500}\)/g, "$1").replace(/[*_`#>|~]+/g, "").trim();
}

/** Says the whole sentences of a text that grows. */
export class SentenceReader {
  constructor() {
    this.read = 0;
  }

  /** Say what became whole since the last time; with `isEnd` all that is left. */
  follow(text, isEnd) {
    const rest = text.slice(this.read);
    let end = isEnd ? rest.length : 0;
    if (!isEnd) for (const found of rest.matchAll(SENTENCE_END)) end = found.index + found[0].length;
    const sentence = withoutMarks(rest.slice(0, end));
    this.read += end;
    if (sentence) say(sentence);
  }
}

/** One answer on its way. `listener` has `changed(run)`, `save(run)` and `ended(run, error)`. */
export class Run {
  constructor(conversation, message, listener) {
    this.conversation = conversation;
    this.message = message;
    this.listener = listener;
    this.aborter = new AbortController();
    this.reader = new SentenceReader();
    this.timer = 0;
    this.release = () => {}; // tells other tabs that nobody fills the message any more
  }

  stop() {
    this.aborter.abort();
  }

  /** Ask a model, and fill the message until the answer ends, is stopped or fails. */
  async start(model = "", { values, key }) {
    const options = { stream: true, stream_options: { include_usage: true }, ...values };
    const body = { model, messages: requestMessages(this.conversation), ...options };
    if (model) this.message.model = model;
    const started = performance.now();
    let failure = null;
    try {
      for await (const part of streamAnswer(body, key, this.aborter.signal))
        this.take(part, performance.now() - started);
      this.message.state = "done";
    } catch (error) {
      failure = this.fail(error);
    }
    clearTimeout(this.timer);
    if (this.message.firstMs === undefined) this.message.totalMs = performance.now() - started;
    this.listener.ended(this, failure);
  }

  take({ text, finish, usage, citations, checked }, elapsedMs) {
    const { message } = this;
    if (text) {
      message.firstMs ??= elapsedMs;
      message.totalMs = elapsedMs;
      message.text += text;
    }
    if (checked !== null) message.text = checked;
    if (finish) message.finish = finish;
    if (usage) message.usage = usage;
    if (citations.length) message.citations = citations;
    this.listener.changed(this);
    this.timer ||= setTimeout(() => {
      this.timer = 0;
      this.listener.save(this);
    }, SAVE_EVERY_MS);
  }

  fail(error) {
    const isStopped = error.name === "AbortError";
    this.message.state = isStopped ? "stopped" : "failed";
    if (isStopped) return null;
    this.message.error = error instanceof ApiError ? error.message : `The page failed: ${error.message}`;
    return error;
  }
}
