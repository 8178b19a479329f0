// Conversations to files and back.
import { download, notify } from "./dom.js";
import { conversationsOf, fileOf, MOST_IMPORT_BYTES, newId, titleOf } from "./records.js";
import { storageProblem } from "./store.js";

export function exportOne(conversation) {
  const name = titleOf(conversation).replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60);
  download(fileOf([conversation]), `${name || "conversation"}.json`);
}

export async function exportAll(store) {
  const stored = await store.all();
  if (stored.length) download(fileOf(stored), "conversations.json");
  else notify("There are no conversations to export yet.");
}

/** Store a conversation unless it is there already with the same words; returns whether it was added. */
async function add(store, conversation) {
  const stored = await store.get(conversation.id);
  const texts = ({ messages }) => JSON.stringify(messages.map(({ role, text }) => [role, text]));
  if (stored && texts(stored) === texts(conversation)) return false;
  if (stored) conversation.id = newId();
  await store.save(conversation);
  return true;
}

/** Add the conversations of a file, and say how many; what is stored already stays as it is. */
export async function importFile(store, file) {
  let added = 0;
  try {
    if (file.size > MOST_IMPORT_BYTES) throw new Error(`The file has more than ${MOST_IMPORT_BYTES >> 20} MiB.`);
    const conversations = conversationsOf(await file.text());
    for (const conversation of conversations) if (await add(store, conversation)) added++;
    const there = conversations.length > added ? "; the others are here already" : "";
    notify(`Imported: ${added} of ${conversations.length}${there}.`);
  } catch (error) {
    const sentence = error instanceof DOMException ? storageProblem(error) : error.message;
    notify(added ? `${sentence} ${added} came in before that.` : sentence, { isError: true });
  }
}
