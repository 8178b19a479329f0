// Markdown within a line, as DOM nodes: text reaches the page only as text nodes.
import { el } from "./dom.js";

const MOST_DEPTH = 8; // of emphasis in links in emphasis
const MOST_LINK_TEXT = 1000;
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const WORD = /[\p{L}\p{N}_]/u;
const CITATION = /\[(\d{1,3})\](?!\()/y;
const AUTOLINK = /<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/y;
const ADDRESS = /https?:\/\/[^\s<>"`\\^{}|]{1,2000}/y;
const WITHOUT_SPACE = "[^\\s()<>]{0,1000}"; // with parentheses in pairs, as addresses of encyclopedias have
const TARGET = new RegExp(
  `\\(\\s{0,9}(?:<([^<>\\n]{0,2000})>|(${WITHOUT_SPACE}(?:\\(${WITHOUT_SPACE}\\)${WITHOUT_SPACE}){0,4}))` +
    `(?:\\s{1,9}(?:"[^"\\n]{0,500}"|'[^'\\n]{0,500}'))?\\s{0,9}\\)`, "y");
const ENTITY = /&(amp|lt|gt|quot|#39|nbsp);/y;
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', "#39": "'", nbsp: "\u00a0" };

/** Return the address as browsers will read it where it is http, https or mailto; else null. */
export function safeAddress(raw) {
  let address;
  try {
    address = new URL(raw); // without a base: a relative address is none
  } catch {
    return null;
  }
  return ["http:", "https:", "mailto:"].includes(address.protocol) ? address.href : null;
}

function link(address, ...children) {
  return el("a", { href: address, rel: "noopener noreferrer", target: "_blank", title: address }, ...children);
}

/** Return the pattern's match at that very place, or null. */
function matchAt(pattern, text, at) {
  pattern.lastIndex = at;
  return pattern.exec(text);
}

function runLength(text, at) {
  let end = at + 1;
  while (end < text.length && text[end] === text[at]) end++;
  return end - at;
}

/** Reads one text; what was searched in vain is remembered, so that hostile text costs no quadratic time. */
class Inline {
  constructor(text, cite, depth = 0, isInLink = false) {
    this.text = text;
    this.cite = cite;
    this.depth = depth;
    this.isInLink = isInLink;
    this.at = 0;
    this.plain = "";
    this.nodes = [];
    this.missing = new Set();
  }

  read() {
    const readers = {
      "\\": this.escape, "`": this.code, "!": this.image, "[": this.bracket, "<": this.autolink, "&": this.entity,
      "*": this.emphasis, _: this.emphasis, "~": this.emphasis, h: this.address, "\n": this.lineEnd,
    };
    while (this.at < this.text.length) {
      const reader = Object.hasOwn(readers, this.text[this.at]) ? readers[this.text[this.at]] : null;
      if (!reader || !reader.call(this)) this.plain += this.text[this.at++];
    }
    this.flush();
    return this.nodes;
  }

  flush() {
    if (this.plain) this.nodes.push(this.plain);
    this.plain = "";
  }

  add(node, end) {
    this.flush();
    this.nodes.push(node);
    this.at = end;
    return true;
  }

  inner(start, end) {
    return new Inline(this.text.slice(start, end), this.cite, this.depth + 1, this.isInLink).read();
  }

  escape() {
    const next = this.text[this.at + 1];
    if (next === "\n") return this.add(el("br"), this.at + 2);
    if (next === undefined || !PUNCTUATION.test(next)) return false;
    this.plain += next;
    this.at += 2;
    return true;
  }

  lineEnd() {
    this.plain = this.plain.trimEnd();
    return this.add(el("br"), this.at + 1);
  }

  /** Return where a run of exactly that many backticks begins, or -1. */
  closingTicks(length, from) {
    if (this.missing.has(length)) return -1;
    for (let at = this.text.indexOf("`", from); at >= 0; at = this.text.indexOf("`", at)) {
      const run = runLength(this.text, at);
      if (run === length) return at;
      at += run;
    }
    this.missing.add(length);
    return -1;
  }

  code() {
    const length = runLength(this.text, this.at);
    const end = this.closingTicks(length, this.at + length);
    if (end < 0) {
      this.plain += "`".repeat(length);
      this.at += length;
      return true;
    }
    const content = this.text.slice(this.at + length, end).replaceAll("\n", " ");
    const isPadded = content.startsWith(" ") && content.endsWith(" ") && content.trim();
    return this.add(el("code", {}, isPadded ? content.slice(1, -1) : content), end + length);
  }

  entity() {
    const found = matchAt(ENTITY, this.text, this.at);
    if (!found) return false;
    this.plain += ENTITIES[found[1]];
    this.at += found[0].length;
    return true;
  }

  autolink() {
    const found = this.isInLink ? null : matchAt(AUTOLINK, this.text, this.at);
    const address = found && safeAddress(found[1]);
    return address ? this.add(link(address, found[1]), this.at + found[0].length) : false;
  }

  address() {
    if (this.isInLink) return false;
    if (this.at > 0 && WORD.test(this.text[this.at - 1])) return false;
    const found = matchAt(ADDRESS, this.text, this.at);
    if (!found) return false;
    let shown = found[0].replace(/[.,;:!?'*_~]{1,50}$/, "");
    if (shown.endsWith(")") && !shown.includes("(")) shown = shown.slice(0, -1);
    if (shown.endsWith("]") && !shown.includes("[")) shown = shown.slice(0, -1);
    const address = safeAddress(shown);
    return address ? this.add(link(address, shown), this.at + shown.length) : false;
  }

  image() {
    if (this.text[this.at + 1] !== "[") return false;
    this.at++; // a picture would be fetched from elsewhere: it is shown as a link
    if (this.bracket()) return true;
    this.at--;
    return false;
  }

  bracket() {
    if (this.isInLink) return false;
    const number = matchAt(CITATION, this.text, this.at);
    const mark = number && this.cite(Number(number[1]));
    if (mark) {
      this.plain = this.plain.replace(/ $/, "\u00a0"); // it stays on the line of what it is for
      return this.add(mark, this.at + number[0].length);
    }
    const end = this.closingBracket();
    if (end < 0 || this.depth >= MOST_DEPTH) return false;
    const target = matchAt(TARGET, this.text, end + 1);
    const address = target && safeAddress(target[1] ?? target[2]);
    if (!address) return false;
    const label = new Inline(this.text.slice(this.at + 1, end), this.cite, this.depth + 1, true).read();
    return this.add(link(address, ...(label.length ? label : [address])), end + 1 + target[0].length);
  }

  closingBracket() {
    let open = 0;
    for (let at = this.at; at < Math.min(this.text.length, this.at + MOST_LINK_TEXT); at++) {
      if (this.text[at] === "\\") at++;
      else if (this.text[at] === "[") open++;
      else if (this.text[at] === "]" && --open === 0) return at;
    }
    return -1;
  }

  emphasis() {
    const mark = this.text[this.at];
    const run = runLength(this.text, this.at);
    const length = mark === "~" ? 2 : Math.min(run, 3);
    const start = this.at + length;
    const before = this.text[this.at - 1];
    const after = this.text[start];
    const isInWord = mark === "_" && before !== undefined && WORD.test(before);
    const opens = run === length && after !== undefined && !/\s/.test(after) && !isInWord;
    const end = opens && this.depth < MOST_DEPTH ? this.closingMark(mark, length, start) : -1;
    if (end < 0) {
      this.plain += mark.repeat(run);
      this.at += run;
      return true;
    }
    const inner = this.inner(start, end);
    const node = {
      1: () => el("em", {}, ...inner),
      2: () => el(mark === "~" ? "del" : "strong", {}, ...inner),
      3: () => el("strong", {}, el("em", {}, ...inner)),
    }[length]();
    return this.add(node, end + length);
  }

  /** Return where a mark of that length ends what starts at `from`, or -1; code and escapes hide marks. */
  closingMark(mark, length, from) {
    if (this.missing.has(mark + length)) return -1;
    for (let at = from; at < this.text.length; at++) {
      const here = this.text[at];
      if (here === "\\") at++;
      else if (here === "`") {
        const run = runLength(this.text, at);
        const end = this.closingTicks(run, at + run);
        at = (end < 0 ? at : end) + run - 1;
      } else if (here === mark) {
        const run = runLength(this.text, at);
        const isWhole = run === length || (run === 3 && length < 3);
        const after = this.text[at + run];
        const isClosing = at > from && !/\s/.test(this.text[at - 1]) && !(mark === "_" && after && WORD.test(after));
        if (isWhole && isClosing) return run === 3 ? at + 3 - length : at;
        at += run - 1;
      }
    }
    this.missing.add(mark + length);
    return -1;
  }
}

/** Return the nodes of a text. `cite` gives the node of a citation's number, or null where there is none. */
export function inline(text, cite = () => null) {
  return new Inline(text, cite).read();
}
