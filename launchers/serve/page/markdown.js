// Markdown in blocks, as DOM nodes. While an answer arrives only the blocks that changed are made anew.
import { button, copyText, el } from "./dom.js";
import { inline } from "./inline.js";

const MOST_NESTING = 10; // of quotes and lists: deeper ones stay text
const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t](.*))?$/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const QUOTE = /^ {0,3}>/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:( +)(.*))?$/;
const SEPARATOR = /^:?-+:?$/;

function isBlank(line) {
  return line.trim() === "";
}

function indentOf(line) {
  return line.length - line.trimStart().length;
}

/** Return the cells of a table's row; a bar after a backslash is text. */
function cells(line) {
  const row = line.trim().replace(/^\|/, "");
  const found = [""];
  for (let at = 0; at < row.length; at++) {
    if (row[at] === "\\" && row[at + 1] === "|") found[found.length - 1] += row[++at];
    else if (row[at] === "|") found.push("");
    else found[found.length - 1] += row[at];
  }
  if (found.at(-1).trim() === "") found.pop();
  return found.map((cell) => cell.trim());
}

function isTable(lines, at) {
  if (at + 1 >= lines.length || !lines[at].includes("|") || !lines[at + 1].includes("-")) return false;
  const marks = cells(lines[at + 1]);
  return marks.length > 0 && marks.every((cell) => SEPARATOR.test(cell)) && marks.length === cells(lines[at]).length;
}

function itemOf(line) {
  const found = ITEM.exec(line);
  if (!found || RULE.test(line)) return null;
  const [, indent, mark, space = " ", text = ""] = found;
  const width = indent.length + mark.length + (space.length > 4 ? 1 : space.length);
  return { indent: indent.length, width, text, isOrdered: mark.length > 1, start: Number.parseInt(mark, 10) };
}

/** Return whether a line ends a paragraph. A number other than 1 does not begin a list there: "in\n1848. Then". */
function startsBlock(lines, at) {
  const item = itemOf(lines[at]);
  const isItem = item && item.text && (!item.isOrdered || item.start === 1);
  return FENCE.test(lines[at]) || HEADING.test(lines[at]) || RULE.test(lines[at]) || QUOTE.test(lines[at]) ||
    Boolean(isItem) || isTable(lines, at);
}

function readFence(lines, at) {
  const opening = FENCE.exec(lines[at]);
  if (!opening) return null;
  const indent = indentOf(lines[at]);
  const mark = opening[1];
  const content = [];
  let end = at + 1;
  for (; end < lines.length; end++) {
    const line = lines[end].trim();
    if (line.length >= mark.length && line === mark[0].repeat(line.length)) break;
    content.push(lines[end].slice(Math.min(indent, indentOf(lines[end]))));
  }
  return { kind: "code", language: opening[2].trim().split(/\s/)[0], text: content.join("\n"), end: end + 1 };
}

function readHeading(lines, at) {
  const found = HEADING.exec(lines[at]);
  if (!found) return null;
  const text = (found[2] ?? "").trim();
  return { kind: "heading", size: found[1].length, text: text.replace(/(^|\s)#+$/, "").trim(), end: at + 1 };
}

function readRule(lines, at) {
  return RULE.test(lines[at]) ? { kind: "rule", end: at + 1 } : null;
}

function readQuote(lines, at) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end++;
  if (end === at) return null;
  return { kind: "quote", lines: lines.slice(at, end).map((line) => line.replace(/^ {0,3}> ?/, "")), end };
}

function readTable(lines, at) {
  if (!isTable(lines, at)) return null;
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|") && !isBlank(lines[end])) end++;
  const sides = cells(lines[at + 1]).map((mark) =>
    mark.endsWith(":") ? (mark.startsWith(":") ? "center" : "right") : "left");
  return { kind: "table", head: cells(lines[at]), rows: lines.slice(at + 2, end).map(cells), sides, end };
}

function readList(lines, at) {
  const first = itemOf(lines[at]);
  if (!first) return null;
  const items = [];
  let end = at;
  let current = first;
  while (end < lines.length) {
    const line = lines[end];
    const item = itemOf(line);
    if (isBlank(line)) {
      const next = end + 1 < lines.length ? lines[end + 1] : "";
      const goesOn = isBlank(next) || indentOf(next) >= current.width || itemOf(next)?.isOrdered === first.isOrdered;
      if (!goesOn) break;
      items.at(-1).push("");
    } else if (item && item.indent < Math.min(current.width, first.indent + 2)) {
      if (item.isOrdered !== first.isOrdered) break;
      current = item;
      items.push([item.text]);
    } else if (indentOf(line) >= Math.min(current.width, first.indent + 2)) {
      items.at(-1).push(line.slice(Math.min(indentOf(line), current.width)));
    } else if (isBlank(items.at(-1).at(-1) ?? "") || startsBlock(lines, end)) break;
    else items.at(-1).push(line.trimStart()); // a paragraph that goes on without indent
    end++;
  }
  return { kind: "list", isOrdered: first.isOrdered, start: first.start, items, end };
}

function readParagraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && !isBlank(lines[end]) && !startsBlock(lines, end)) end++;
  const text = lines.slice(at, end).map((line) => line.trimStart()).join("\n");
  return { kind: "paragraph", text: text.trimEnd(), end };
}

/** Return the blocks of lines, each with the source that it is made of. */
export function blocksOf(lines) {
  const blocks = [];
  let level = 2; // of the last heading: a page's outline has no gaps
  for (let at = 0; at < lines.length; ) {
    if (isBlank(lines[at])) {
      at++;
      continue;
    }
    const block = readFence(lines, at) ?? readHeading(lines, at) ?? readRule(lines, at) ?? readQuote(lines, at) ??
      readTable(lines, at) ?? readList(lines, at) ?? readParagraph(lines, at);
    if (block.kind === "heading") block.level = level = Math.min(6, block.size + 2, level + 1);
    block.source = `${block.kind} ${block.level ?? ""}\n${lines.slice(at, block.end).join("\n")}`;
    blocks.push(block);
    at = block.end;
  }
  return blocks;
}

function codeBlock(block) {
  const copy = button("Copy", () => copyText(block.text, copy), { class: "quiet" });
  const label = block.language ? `Code, ${block.language}` : "Code";
  return el("figure", { class: "code" },
    el("figcaption", {}, el("span", {}, block.language || "code"), copy),
    el("pre", { tabindex: "0", role: "group", "aria-label": label }, el("code", {}, block.text)));
}

function tableRow(tag, texts, block, cite) {
  const cell = (side, column) =>
    el(tag, { class: `to-${side}`, scope: tag === "th" && "col" }, ...inline(texts[column] ?? "", cite));
  return el("tr", {}, ...block.sides.map(cell));
}

function tableBlock(block, cite) {
  const head = el("thead", {}, tableRow("th", block.head, block, cite));
  const body = el("tbody", {}, ...block.rows.map((texts) => tableRow("td", texts, block, cite)));
  return el("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Table" },
    el("table", {}, head, body));
}

function listBlock(block, cite, depth) {
  const items = block.items.map((lines) => {
    const parts = depth < MOST_NESTING ? blocksOf(lines) : [{ kind: "paragraph", text: lines.join("\n") }];
    const nodes = parts.flatMap((part) => // a lone first paragraph needs no space around it
      part.kind === "paragraph" && part === parts[0] ? inline(part.text, cite) : [blockNode(part, cite, depth + 1)]);
    return el("li", {}, ...nodes);
  });
  const start = block.isOrdered && block.start !== 1 ? block.start : null;
  return el(block.isOrdered ? "ol" : "ul", { start }, ...items);
}

function quoteBlock(block, cite, depth) {
  if (depth >= MOST_NESTING) return el("blockquote", {}, el("p", {}, block.lines.join("\n")));
  return el("blockquote", {}, ...blocksOf(block.lines).map((part) => blockNode(part, cite, depth + 1)));
}

function blockNode(block, cite, depth) {
  switch (block.kind) {
    case "code": return codeBlock(block);
    case "heading": // headings inside lists and quotes are none of the page's outline
      return el(depth ? "p" : `h${block.level}`, { class: `heading size-${block.size}` }, ...inline(block.text, cite));
    case "rule": return el("hr");
    case "quote": return quoteBlock(block, cite, depth);
    case "table": return tableBlock(block, cite);
    case "list": return listBlock(block, cite, depth);
    default: return el("p", {}, ...inline(block.text, cite));
  }
}

/** Shows a text that may grow; blocks that stay the same keep their elements, and with them focus and selection. */
export class MarkdownView {
  constructor(container) {
    this.container = container;
    this.sources = [];
    this.cite = () => null;
  }

  /** Show the text. `cite` is a function of its own for every set of citations. */
  show(text, cite = this.cite) {
    const blocks = blocksOf(text.replace(/\r\n?/g, "\n").split("\n"));
    let same = 0;
    if (cite === this.cite)
      while (same < blocks.length && this.sources[same] === blocks[same].source) same++;
    this.cite = cite;
    while (this.container.children.length > same) this.container.lastElementChild.remove();
    this.container.append(...blocks.slice(same).map((block) => blockNode(block, cite, 0)));
    this.sources = blocks.map((block) => block.source);
  }
}
