// Elements, words for the screen reader, and the clipboard.

/** Return an element with attributes; `onNAME` listens. Children are nodes or plain text, never markup. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export function byId(id) {
  return document.getElementById(id);
}

export function button(label, onclick, attributes = {}) {
  return el("button", { type: "button", onclick, ...attributes }, label);
}

/** Say a sentence to a screen reader, politely. Each is a new line, so that a repeated one is read again. */
export function say(sentence) {
  const status = byId("spoken");
  status.append(el("p", {}, sentence));
  while (status.childElementCount > 6) status.firstElementChild.remove();
}

/** Show a sentence above the conversation until it is dismissed or another takes its place; "" shows none. */
export function notify(sentence, { isError = false, action = "", act = null } = {}) {
  const bar = byId("notice");
  bar.replaceChildren();
  bar.className = isError ? "notice is-error" : "notice";
  if (!sentence) return;
  const doIt = () => {
    notify("");
    act();
  };
  const dismiss = button("Dismiss", () => notify(""), { class: "quiet" });
  bar.append(el("p", {}, sentence), ...(act ? [button(action, doIt)] : []), dismiss);
}

/** Copy text; where the page is not on a secure address, by the older way through a selection. */
export async function copyText(text, from) {
  const label = from.textContent;
  let isCopied = false;
  if (navigator.clipboard) {
    isCopied = await navigator.clipboard.writeText(text).then(() => true, () => false);
  }
  if (!isCopied) {
    const area = el("textarea", { class: "off-screen", "aria-hidden": "true", tabindex: "-1" });
    area.value = text;
    document.body.append(area);
    area.select();
    isCopied = document.execCommand("copy");
    area.remove();
    from.focus();
  }
  from.textContent = isCopied ? "Copied" : "Can't copy";
  say(isCopied ? "Copied." : "The browser does not allow copying.");
  setTimeout(() => (from.textContent = label), 1500);
}

/**
 * Ask in a dialog; the browser gives the focus back afterwards.
 *
 * With a `text`, that is what the user may change. Returns the text (without one: "yes") if confirmed, else null.
 */
export function ask(question, action, text = null) {
  const dialog = byId("question");
  const field = byId("question-field");
  byId("question-text").textContent = question;
  byId("question-yes").textContent = action;
  field.hidden = text === null;
  field.value = text ?? "";
  dialog.returnValue = "";
  dialog.showModal();
  (text === null ? byId("question-yes") : field).focus();
  field.select();
  return new Promise((resolve) => {
    const close = () => resolve(dialog.returnValue === "yes" ? (text === null ? "yes" : field.value) : null);
    dialog.addEventListener("close", close, { once: true });
  });
}

/** Offer text as a file to keep. */
export function download(text, name) {
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const link = el("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

export function plural(count, word) {
  return `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
}
