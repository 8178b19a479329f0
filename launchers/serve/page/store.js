// Where conversations are kept: the browser's database, and a channel on which the tabs tell each other of changes.
import { newId, titleOf } from "./records.js";

const NAME = "trimaran";
const RECORDS = "conversations";
const LEFT = "trimaran.left."; // and a conversation's id: an answer that was arriving when its page went
const LOCK = "trimaran.answer."; // and a message's id: held by the tab that fills it
const REPLY_MS = 2000;

function asPromise(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function openDatabase() {
  const request = indexedDB.open(NAME, 1);
  request.onupgradeneeded = () => request.result.createObjectStore(RECORDS, { keyPath: "id" });
  return asPromise(request);
}

/** Return a sentence for what a browser says when it can't keep something. */
export function storageProblem(error) {
  if (error?.name === "QuotaExceededError")
    return "The browser has no room for more conversations. What is new here is not kept: export it, or delete others.";
  return `The browser can't keep conversations (${error?.message || "it does not say why"}). Export what shall stay.`;
}

/** Conversations in IndexedDB. Every change checks, in one transaction, that no other tab was there first. */
class Database {
  constructor(database) {
    this.database = database;
  }

  records(mode) {
    return this.database.transaction(RECORDS, mode).objectStore(RECORDS);
  }

  all() {
    return asPromise(this.records("readonly").getAll());
  }

  get(id) {
    return asPromise(this.records("readonly").get(id));
  }

  remove(id) {
    return asPromise(this.records("readwrite").delete(id));
  }

  /** Store the record if what is stored has the revision `record.revision`; returns whether it was so. */
  put(record) {
    return new Promise((resolve, reject) => {
      const transaction = this.database.transaction(RECORDS, "readwrite");
      const records = transaction.objectStore(RECORDS);
      let isFirst = false;
      const stored = records.get(record.id);
      stored.onsuccess = () => {
        isFirst = (stored.result?.revision ?? 0) === record.revision;
        if (isFirst) records.put({ ...record, revision: record.revision + 1 });
      };
      transaction.oncomplete = () => resolve(isFirst);
      transaction.onabort = () => reject(transaction.error);
    });
  }
}

/** Conversations of this page alone, where the browser keeps nothing. */
class Memory {
  constructor() {
    this.records = new Map();
  }

  async all() {
    return [...this.records.values()];
  }

  async get(id) {
    return this.records.get(id);
  }

  async remove(id) {
    this.records.delete(id);
  }

  async put(record) {
    this.records.set(record.id, structuredClone({ ...record, revision: record.revision + 1 }));
    return true;
  }
}

/** All conversations of this browser. The listener gets `{kind, id}` of what other tabs do. */
export class Store {
  constructor(records, problem) {
    this.records = records;
    this.problem = problem;
    this.writes = Promise.resolve();
    this.channel = new BroadcastChannel(NAME);
    this.mine = new Set(); // ids of messages that this tab fills
    this.replies = new Map();
  }

  /** Open the database; where the browser has none, `problem` says so and conversations live as long as the page. */
  static async open() {
    try {
      return new Store(new Database(await openDatabase()), "");
    } catch (error) {
      return new Store(new Memory(), storageProblem(error));
    }
  }

  listen(listener) {
    this.channel.onmessage = ({ data }) => {
      if (data.kind === "who" && this.mine.has(data.id)) this.tell("here", data.id);
      else if (data.kind === "here") this.replies.get(data.id)?.(true);
      else if (data.kind !== "who") listener(data);
    };
  }

  tell(kind, id) {
    this.channel.postMessage({ kind, id });
  }

  /** Let other tabs know that this one fills a message; returns a function that ends it. */
  claim(messageId) {
    let release = () => {};
    this.mine.add(messageId);
    navigator.locks?.request(LOCK + messageId, () => new Promise((resolve) => (release = resolve)));
    return () => {
      this.mine.delete(messageId);
      release();
    };
  }

  /** Find out whether another tab fills a message: by its lock, or, where the address is not secure, by asking. */
  async isClaimed(messageId) {
    if (navigator.locks) return (await navigator.locks.query()).held.some(({ name }) => name === LOCK + messageId);
    const reply = new Promise((resolve) => {
      this.replies.set(messageId, resolve);
      setTimeout(resolve, REPLY_MS, false);
    });
    this.tell("who", messageId);
    return reply.finally(() => this.replies.delete(messageId));
  }

  /** Return all conversations, the latest first. */
  async all() {
    return (await this.records.all()).sort((one, other) => other.updated - one.updated);
  }

  get(id) {
    return this.records.get(id);
  }

  async remove(id) {
    await this.records.remove(id);
    this.tell("removed", id);
  }

  /**
   * Store a conversation as it is now, after what is being stored already.
   *
   * Where another tab changed or deleted the stored one meanwhile, that stays as it is, and this one becomes a copy
   * with an id of its own; returns whether that was so.
   */
  save(conversation) {
    const write = this.writes.then(async () => {
      if (await this.records.put(conversation)) {
        conversation.revision++;
        this.tell("changed", conversation.id);
        return false;
      }
      conversation.title = `${titleOf(conversation)} (copy)`;
      Object.assign(conversation, { id: newId(), isNamed: true, revision: 0 });
      await this.records.put(conversation);
      conversation.revision++;
      this.tell("changed", conversation.id);
      return true;
    });
    this.writes = write.catch(() => {});
    return write;
  }

  /** Keep what came of an answer while the page goes, when the database would answer too late. */
  keepLeft({ id }, message) {
    try {
      localStorage.setItem(LEFT + id, JSON.stringify({ message: message.id, text: message.text }));
    } catch {
      // no room: what was stored of the answer a moment ago is what stays
    }
  }

  /** Put what `keepLeft` kept in pages that are gone into their conversations. */
  async takeLeft() {
    for (const key of Object.keys(window.localStorage ?? {}).filter((each) => each.startsWith(LEFT))) {
      let left = null;
      try {
        left = JSON.parse(localStorage.getItem(key));
      } catch {
        // not ours
      }
      localStorage.removeItem(key);
      const conversation = await this.get(key.slice(LEFT.length));
      const message = conversation?.messages.find((each) => each.id === left?.message);
      if (!message || !["running", "left"].includes(message.state) || !left.text?.startsWith(message.text)) continue;
      Object.assign(message, { text: left.text, state: "left" });
      await this.save(conversation);
    }
  }
}
