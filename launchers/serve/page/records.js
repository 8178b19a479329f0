// Conversations as records: made, titled, written to files and read back from files that anyone may have made.
import { citationsOf } from "./api.js";

const FORMAT = "trimaran-conversations";
const MOST_MESSAGES = 10_000;
const MOST_TITLE = 200;
export const MOST_IMPORT_BYTES = 64 << 20;
const ROLES = ["user", "assistant"];
/** running: it arrives now; stopped: by the user; failed: by an error; left: the page was closed in its middle. */
const STATES = ["done", "running", "stopped", "failed", "left"];

/** Return a number that no other record has; `crypto.randomUUID` is missing on addresses other than https. */
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** `revision` counts what was stored of the conversation: 0 is not stored yet. */
export function newConversation(system) {
  const now = Date.now();
  return { id: newId(), title: "", isNamed: false, created: now, updated: now, revision: 0, system, messages: [] };
}

export function newMessage(role, text) {
  return { id: newId(), role, text, state: role === "user" ? "done" : "running" };
}

/** Return the name of a conversation: its own, or its first words. */
export function titleOf(conversation) {
  if (conversation.isNamed && conversation.title) return conversation.title;
  const words = (conversation.messages.find((message) => message.role === "user")?.text ?? "").trim().split(/\s+/);
  let title = "";
  for (const word of words) {
    if (title && title.length + word.length > 48) return `${title} …`;
    title = title ? `${title} ${word}` : Array.from(word).slice(0, 48).join("");
  }
  return title || "New conversation";
}

/** Return what the model is asked: answers without a word are left out. */
export function requestMessages(conversation) {
  const system = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  const spoken = conversation.messages.filter((message) => message.role === "user" || message.text);
  return [...system, ...spoken.map(({ role, text }) => ({ role, content: text }))];
}

export function includesText(conversation, words) {
  const wanted = words.toLocaleLowerCase();
  return [titleOf(conversation), ...conversation.messages.map((message) => message.text)].some((text) =>
    text.toLocaleLowerCase().includes(wanted));
}

class Wrong extends Error {}

function check(isRight, place, problem) {
  if (!isRight) throw new Wrong(`${place} ${problem}`);
}

function checkedText(value, place) {
  check(typeof value === "string", place, "has to be a text");
  return value;
}

function checkedTime(value, place) {
  check(Number.isFinite(value) && value >= 0 && value < 8.64e15, place, "has to be a time in milliseconds since 1970");
  return value;
}

function optional(record, names, isRight) {
  return Object.fromEntries(names.filter((name) => isRight(record[name])).map((name) => [name, record[name]]));
}

function checkedUsage(usage) {
  const counts = optional(usage ?? {}, ["prompt_tokens", "completion_tokens", "total_tokens"], Number.isInteger);
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  const details = Number.isInteger(cached) ? { prompt_tokens_details: { cached_tokens: cached } } : {};
  return Number.isInteger(counts.completion_tokens) ? { usage: { ...counts, ...details } } : {};
}

function checkedMessage(value, place) {
  check(value !== null && typeof value === "object", place, "has to be an object");
  check(ROLES.includes(value.role), `${place}.role`, 'has to be "user" or "assistant"');
  check(STATES.includes(value.state ?? "done"), `${place}.state`, `has to be one of ${STATES.join(", ")}`);
  const citations = citationsOf(value.citations);
  return {
    id: newId(),
    role: value.role,
    text: checkedText(value.text, `${place}.text`),
    state: value.state === "running" ? "left" : (value.state ?? "done"),
    ...optional(value, ["error", "finish", "model"], (each) => typeof each === "string"),
    ...optional(value, ["firstMs", "totalMs"], (each) => Number.isFinite(each) && each >= 0),
    ...checkedUsage(value.usage),
    ...(citations.length ? { citations } : {}),
  };
}

function checkedConversation(value, place) {
  check(value !== null && typeof value === "object", place, "has to be an object");
  check(Array.isArray(value.messages), `${place}.messages`, "has to be a list");
  check(value.messages.length <= MOST_MESSAGES, `${place}.messages`, `has more than ${MOST_MESSAGES} messages`);
  const id = value.id ?? newId();
  check(typeof id === "string" && /^[\w-]{1,64}$/.test(id), `${place}.id`, "has to be up to 64 letters, digits, - and _");
  return {
    id,
    title: checkedText(value.title ?? "", `${place}.title`).slice(0, MOST_TITLE),
    isNamed: value.isNamed === true,
    created: checkedTime(value.created ?? Date.now(), `${place}.created`),
    updated: checkedTime(value.updated ?? Date.now(), `${place}.updated`),
    revision: 0,
    system: checkedText(value.system ?? "", `${place}.system`),
    messages: value.messages.map((message, number) => checkedMessage(message, `${place}.messages[${number}]`)),
  };
}

/** Return the text of a file that `conversationsOf` reads. */
export function fileOf(conversations) {
  const kept = conversations.map(({ revision, ...conversation }) => conversation);
  return JSON.stringify({ format: FORMAT, version: 1, conversations: kept }, null, 1);
}

/** Return the conversations of a file's text; throws an error whose message is a sentence. */
export function conversationsOf(text) {
  let value;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new Error(`The file is no JSON: ${error.message}.`);
  }
  if (value?.format !== FORMAT || value.version !== 1 || !Array.isArray(value.conversations))
    throw new Error(`The file holds no exported conversations: its "format" has to be "${FORMAT}", its "version" 1.`);
  try {
    return value.conversations.map((each, number) => checkedConversation(each, `conversations[${number}]`));
  } catch (error) {
    if (error instanceof Wrong) throw new Error(`Nothing is imported: in the file, ${error.message}.`);
    throw error;
  }
}
