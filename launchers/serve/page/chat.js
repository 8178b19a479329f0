// The open conversation: what is shown of it, and what is asked, stopped, changed and kept.
import { listModels } from "./api.js";
import { ask, byId, el, notify, say } from "./dom.js";
import { MessageView } from "./message.js";
import { newConversation, newMessage, titleOf } from "./records.js";
import { Run } from "./runs.js";
import { storageProblem } from "./store.js";

const OPEN = "trimaran.open"; // the tab's conversation
const LOOK_AGAIN_MS = 2000;
const FOLLOW_PX = 60;

/** Everything of the open conversation; answers of others go on arriving meanwhile. */
export class Chat {
  constructor(store, settings) {
    this.store = store;
    this.settings = settings;
    this.conversation = newConversation(settings.system);
    this.views = [];
    this.runs = new Set();
    this.elsewhere = new Set(); // conversations that another tab is answering in
    this.deleted = new WeakSet();
    this.models = [];
    this.frame = 0;
    this.isFollowing = true;
    this.messages = byId("messages");
    byId("scroll").addEventListener("scroll", () => this.noteScroll());
    byId("latest").addEventListener("click", () => this.follow(true));
    store.listen((news) => this.hear(news));
  }

  /** Tie the list, which shows what changes here. */
  attach(sidebar) {
    this.sidebar = sidebar;
  }

  get run() {
    return [...this.runs].find((run) => run.conversation === this.conversation) ?? null;
  }

  isBusy() {
    return this.run !== null || this.elsewhere.has(this.conversation.id);
  }

  // Which conversation

  /** Open the conversation that this tab had open, or a new one. */
  async reopen() {
    let id = null;
    try {
      id = sessionStorage.getItem(OPEN);
    } catch {
      // no storage: a new conversation
    }
    if (id) await this.select(id, { isQuiet: true });
    else this.show();
  }

  startNew() {
    this.open(newConversation(this.settings.system));
    byId("prompt").focus();
  }

  /** Open a stored conversation. */
  async select(id, { isQuiet = false } = {}) {
    const run = [...this.runs].find((each) => each.conversation.id === id);
    const conversation = run?.conversation ?? (await this.store.get(id).catch(() => undefined));
    if (!conversation && !isQuiet) notify("This conversation is not there any more: it was deleted in another tab.");
    this.open(conversation ?? newConversation(this.settings.system));
  }

  open(conversation) {
    this.conversation = conversation;
    this.remember();
    this.views = [];
    this.messages.replaceChildren();
    byId("system").open = false;
    this.show();
    this.follow(true);
    this.watchOthers();
  }

  remember() {
    try {
      sessionStorage.setItem(OPEN, this.conversation.id);
    } catch {
      // a reload then opens a new conversation; this one is in the list
    }
    this.sidebar.mark(this.conversation.id);
  }

  isUnfinished() {
    return this.conversation.messages.at(-1)?.state === "running";
  }

  // Other tabs

  /** Where an answer is not whole: see whether another tab is at it, now and again; if none is, it was left. */
  async watchOthers() {
    clearTimeout(this.watchTimer);
    const { id } = this.conversation;
    if (this.run || !this.isUnfinished()) {
      if (this.elsewhere.delete(id)) this.show();
      return;
    }
    this.elsewhere.add(id);
    this.show();
    const isClaimed = await this.store.isClaimed(this.conversation.messages.at(-1).id);
    if (isClaimed) this.watchTimer = setTimeout(() => this.watchOthers(), LOOK_AGAIN_MS);
    else await this.settle(id);
  }

  /** End an answer that nobody fills any more, with all that came of it. */
  async settle(id) {
    await this.store.takeLeft().catch(() => {});
    const stored = await this.store.get(id).catch(() => undefined);
    this.elsewhere.delete(id);
    if (this.conversation.id !== id || this.run) return;
    if (stored?.revision > this.conversation.revision) this.conversation = stored;
    if (this.isUnfinished()) {
      this.conversation.messages.at(-1).state = "left";
      this.save(this.conversation);
    }
    this.show();
  }

  /** Take note of what another tab does. */
  hear({ kind, id }) {
    if (kind === "running") this.elsewhere.add(id);
    if (kind === "ended") this.elsewhere.delete(id);
    this.sidebar.showSoon();
    const isOpen = id === this.conversation.id;
    if (!isOpen || this.run || this.messages.querySelector(".edit")) return; // what is typed here stays
    if (kind === "removed") {
      notify("This conversation was deleted in another tab.");
      this.open(newConversation(this.settings.system));
    } else this.reload();
  }

  async reload() {
    const { id } = this.conversation;
    const stored = await this.store.get(id).catch(() => undefined);
    if (!stored || this.run || id !== this.conversation.id || stored.revision < this.conversation.revision) return;
    this.conversation = stored;
    this.show();
    this.follow();
    this.watchOthers();
  }

  // What is shown

  /** Show the conversation as it is now; messages that stay keep their elements. */
  show() {
    const { conversation } = this;
    const { messages } = conversation;
    const title = titleOf(conversation);
    byId("title").textContent = title;
    document.title = messages.length ? `${title} – trimaran` : "trimaran";
    byId("empty").hidden = messages.length > 0;
    const system = byId("system-text");
    if (document.activeElement !== system) system.value = conversation.system;
    byId("system-note").textContent = conversation.system.trim() ? "set" : "none";
    const same = messages.findIndex((message, number) => this.views[number]?.message.id !== message.id);
    for (const view of this.views.splice(same < 0 ? messages.length : same)) view.element.remove();
    for (const [number, message] of messages.entries()) {
      this.views[number] ??= this.newView(message);
      this.views[number].message = message;
      this.views[number].show({ isLast: number === messages.length - 1, isElsewhere: !this.run });
    }
    this.showComposer();
  }

  newView(message) {
    const view = new MessageView(message, {
      edit: (each, text) => this.edit(each, text),
      regenerate: (each) => this.regenerate(each),
      isBusy: () => this.isBusy(),
    });
    this.messages.append(view.element);
    return view;
  }

  showComposer() {
    const hadFocus = document.activeElement === byId("stop");
    byId("stop").hidden = this.run === null;
    byId("send").hidden = this.run !== null;
    byId("send").disabled = this.isBusy();
    if (hadFocus && !this.run) byId("prompt").focus();
  }

  showSoon() {
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      if (!this.run) return;
      this.views.at(-1).show({ isLast: true });
      this.follow();
    });
  }

  noteScroll() {
    const { scrollHeight, scrollTop, clientHeight } = byId("scroll");
    this.isFollowing = scrollHeight - scrollTop - clientHeight < FOLLOW_PX;
    byId("latest").hidden = this.isFollowing;
  }

  /** Show the newest words if the reader was there already, or is to be taken there. */
  follow(isForced = false) {
    if (!isForced && !this.isFollowing) return;
    byId("scroll").scrollTop = byId("scroll").scrollHeight;
    this.noteScroll();
  }

  // Asking

  /** Ask; returns whether the text was taken. */
  send(text) {
    if (this.isBusy() || !text.trim()) return false;
    this.conversation.messages.push(newMessage("user", text.trim()));
    this.answer();
    return true;
  }

  edit(message, text) {
    if (this.isBusy()) return notify("An answer is arriving: stop it or let it end, then send the change.");
    this.cutFrom(message);
    this.send(text);
    byId("prompt").focus();
  }

  regenerate(message) {
    if (this.isBusy()) return;
    this.cutFrom(message);
    this.answer();
    byId("prompt").focus();
  }

  cutFrom(message) {
    const { messages } = this.conversation;
    messages.splice(messages.findIndex((each) => each.id === message.id));
  }

  answer() {
    const { conversation } = this;
    const message = newMessage("assistant", "");
    conversation.messages.push(message);
    conversation.updated = Date.now();
    const run = new Run(conversation, message, {
      changed: (each) => this.changed(each),
      save: (each) => this.save(each.conversation),
      ended: (each, failure) => this.ended(each, failure),
    });
    this.runs.add(run);
    run.release = this.store.claim(message.id);
    notify("");
    this.show();
    this.follow(true);
    this.save(conversation).then(() => this.sidebar.show());
    this.remember();
    this.store.tell("running", conversation.id);
    this.begin(run);
  }

  async begin(run) {
    if (!this.models.length) await this.loadModels(); // the server was not there before
    const { models, settings } = this;
    run.start(models.includes(settings.model) ? settings.model : models[0], settings);
    if (run === this.run) this.show(); // the model's name
  }

  changed(run) {
    if (run !== this.run) return;
    run.reader.follow(run.message.text, false);
    this.showSoon();
  }

  async ended(run, failure) {
    this.runs.delete(run);
    if (this.conversation === run.conversation) {
      run.reader.follow(run.message.text, true);
      say(failure ? run.message.error : run.message.state === "stopped" ? "Stopped." : "The answer is whole.");
      this.show();
      this.follow();
    }
    if (failure?.status === 401) this.askKey();
    if (failure?.status === 404) this.loadModels();
    await this.save(run.conversation);
    run.release();
    this.store.tell("ended", run.conversation.id);
    this.sidebar.show();
  }

  stop() {
    this.run?.stop();
  }

  // Keeping

  /** Store a conversation; says so where the browser can't, or where another tab changed it meanwhile. */
  async save(conversation) {
    if (this.deleted.has(conversation)) return;
    try {
      if (!(await this.store.save(conversation))) return;
    } catch (error) {
      return notify(storageProblem(error), { isError: true });
    }
    notify("Another tab changed or deleted this conversation at the same time; what is here is kept as a copy.");
    if (conversation !== this.conversation) return;
    this.remember();
    this.show();
  }

  /** Keep what came of the answers, for the page is about to go. */
  leave() {
    for (const run of this.runs) {
      this.store.keepLeft(run.conversation, run.message);
      this.store.tell("ended", run.conversation.id);
    }
  }

  setSystem(text) {
    this.conversation.system = text;
    byId("system-note").textContent = text.trim() ? "set" : "none";
    clearTimeout(this.systemTimer);
    const { conversation } = this;
    this.systemTimer = setTimeout(() => this.save(conversation).then(() => this.sidebar.show()), 400);
  }

  async rename() {
    const { conversation } = this;
    const title = await ask("Name of the conversation", "Rename", titleOf(conversation));
    if (title === null) return;
    conversation.title = title.trim().slice(0, 200);
    conversation.isNamed = conversation.title !== "";
    await this.save(conversation);
    this.show();
    this.sidebar.show();
  }

  async remove() {
    const { conversation } = this;
    if ((await ask(`Delete “${titleOf(conversation)}”? It can't be brought back.`, "Delete")) === null) return;
    this.deleted.add(conversation);
    for (const run of this.runs) if (run.conversation === conversation) run.stop();
    try {
      await this.store.writes;
      await this.store.remove(conversation.id);
    } catch (error) {
      return notify(storageProblem(error), { isError: true });
    }
    say("Deleted.");
    this.startNew();
    this.sidebar.show();
  }

  // The server

  /** Read which models there are; asks for the key where the server wants one. */
  async loadModels() {
    try {
      this.imitations = await listModels(this.settings.key);
    } catch (error) {
      if (error.status === 401) this.askKey();
      else notify(error.message, { isError: true, action: "Try again", act: () => this.loadModels() });
      return;
    }
    byId("key-form").hidden = true;
    this.models = [...this.imitations.keys()];
    const chosen = this.models.includes(this.settings.model) ? this.settings.model : this.models[0];
    const select = byId("model");
    const option = (name) => el("option", { value: name, selected: name === chosen }, name);
    select.replaceChildren(...this.models.map(option));
    select.hidden = this.models.length < 2;
    byId("model-name").textContent = this.models.length === 1 ? this.models[0] : "";
    byId("empty-model").textContent = chosen ?? "the model";
    byId("twin").textContent = this.imitations.get(chosen) ?? "";
  }

  askKey() {
    byId("key-form").hidden = false;
    byId("key").value = "";
    byId("key").focus();
    this.follow();
    say("The server asks for an API key.");
  }

  /** Use a key, and with it ask again what failed without. */
  async useKey(key) {
    this.settings.key = key;
    await this.loadModels();
    if (!byId("key-form").hidden) return notify("The server does not accept this API key.", { isError: true });
    notify("");
    const last = this.conversation.messages.at(-1);
    if (last?.state === "failed" && !last.text) this.regenerate(last);
    byId("prompt").focus();
  }
}
