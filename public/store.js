// What the browser keeps: conversations in its database, small things (settings, theme, key) in its local storage.

const DATABASE = 'pyllama'
const CONVERSATIONS = 'conversations'

let database = null

function open() {
  database ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(DATABASE, 1)
    request.onupgradeneeded = () => request.result.createObjectStore(CONVERSATIONS, { keyPath: 'id' })
    request.onsuccess = () => resolve(request.result)
    request.onerror = () => reject(request.error)
  })
  return database
}

async function transact(mode, action) {
  const db = await open()
  return new Promise((resolve, reject) => {
    const transaction = db.transaction(CONVERSATIONS, mode)
    const request = action(transaction.objectStore(CONVERSATIONS))
    transaction.oncomplete = () => resolve(request.result)
    transaction.onerror = transaction.onabort = () => reject(transaction.error ?? request.error)
  })
}

export const loadConversations = () => transact('readonly', (store) => store.getAll())
export const saveConversation = (conversation) => transact('readwrite', (store) => store.put(conversation))
export const deleteConversation = (id) => transact('readwrite', (store) => store.delete(id))

const PREFIX = 'pyllama.'

// A value under a name; `otherwise` where there is none, or no storage.
export function recall(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(PREFIX + name)) ?? otherwise
  } catch {
    return otherwise
  }
}

// Keeps a value under a name; undefined forgets it.
export function remember(name, value) {
  try {
    if (value === undefined) localStorage.removeItem(PREFIX + name)
    else localStorage.setItem(PREFIX + name, JSON.stringify(value))
  } catch {
    // No storage, or none left: it lasts as long as the page.
  }
}
