// What a conversation is made of, and what can be done with that: functions without state, and without a view.
//
// A conversation is { id, mode: 'chat' | 'text', title, isNamed?, changed, system, messages, pieces }, and a text besides has what
// an answer has: ended?, stats?, truncated?, error?, and `before`, the pieces before its last continuation.
//   messages  of a chat: { role, content, images?, pieces?, ended?, stats?, truncated?, error?, versions?, version? }
//   versions  of an answer: what the model has said to the same question; the one at `version` is shown
//   pieces    of a text, or of an answer with probabilities: { text, isNew?, tokens? }; isNew: the model wrote it
//   tokens    of a piece: { text, prob, top: [[text, prob], …] }; prob is null where it is not known

export const textOf = ({ pieces }) => pieces.map(({ text }) => text).join('')

export const isEmpty = ({ messages, pieces }) => messages.length === 0 && pieces.length === 0

export function newConversation(mode) {
  // Pages that come over plain HTTP from another machine have no randomUUID.
  const id = crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`
  return { id, mode, title: '', changed: 0, system: '', messages: [], pieces: [] }
}

// A conversation from a file that anybody may have written: what the page can show of it, or null.
export function restored(value) {
  const isObject = (it) => typeof it === 'object' && it !== null
  const text = (it) => (typeof it === 'string' ? it : '')
  if (!isObject(value) || !text(value.id) || !Array.isArray(value.messages) || !Array.isArray(value.pieces)) return null
  const isToken = (it) => isObject(it) && typeof it.text === 'string' && Array.isArray(it.top) && it.top.every(Array.isArray)
  const piece = ({ text: own, isNew, tokens }) => ({
    text: text(own),
    ...(isNew === true && { isNew }),
    ...(Array.isArray(tokens) && tokens.length && tokens.every(isToken) && { tokens }),
  })
  const message = ({ role, content, images, pieces }) => ({
    role: role === 'user' ? 'user' : 'assistant',
    content: text(content),
    ...(Array.isArray(images) && { images: images.map(text).filter((url) => url.startsWith('data:image/')) }),
    ...(Array.isArray(pieces) && pieces.every((it) => isObject(it) && piece(it).tokens) && { pieces: pieces.map(piece) }),
  })
  return {
    ...newConversation(value.mode === 'text' ? 'text' : 'chat'),
    id: value.id,
    title: text(value.title),
    isNamed: value.isNamed === true,
    changed: Number(value.changed) || 0,
    system: text(value.system),
    messages: value.messages.filter(isObject).map(message),
    pieces: value.pieces.filter(isObject).map(piece),
  }
}

export function titleOf({ mode, messages, pieces }) {
  const text = (mode === 'chat' ? messages[0]?.content : textOf({ pieces })) ?? ''
  return firstWords(text, 48)
}

// What answers to the same question differ in.
export const VERSION = ['content', 'pieces', 'ended', 'stats', 'truncated', 'error']

export function versionsOf(message) {
  const own = Object.fromEntries(VERSION.filter((name) => name in message).map((name) => [name, message[name]]))
  return (message.versions ?? [own]).map((version, i) => (i === (message.version ?? 0) ? own : version))
}

// A text's beginning, on one line.
export function firstWords(text, most) {
  const line = text.slice(0, 10 * most).trim().replace(/\s+/g, ' ')
  if (line.length <= most) return line
  const end = line.lastIndexOf(' ', most - 2)
  return `${line.slice(0, end > most / 2 ? end : most - 2)} …`
}

// A chat as the server wants it. Answers that came to nothing are left out; what was said on both sides of one is joined, as
// many models' templates insist on roles that take turns.
export function chatMessages({ system, messages }) {
  const told = system.trim() ? [{ role: 'system', content: system }] : []
  let last = null
  for (const { role, content, images = [] } of messages) {
    if (role === 'assistant' && content === '') continue
    if (last?.role === role) last.content = joined(last.content, contentOf(content, images))
    else told.push(last = { role, content: contentOf(content, images) })
  }
  return told
}

function contentOf(text, images) {
  if (images.length === 0) return text
  return [{ type: 'text', text }, ...images.map((url) => ({ type: 'image_url', image_url: { url } }))]
}

function joined(a, b) {
  if (typeof a === 'string' && typeof b === 'string') return `${a}\n\n${b}`
  return [a, b].flatMap((content) => (typeof content === 'string' ? [{ type: 'text', text: content }] : content))
}

// Adds a piece of text; one without tokens becomes part of the last one if that is of the same kind.
export function addPiece(pieces, piece) {
  const last = pieces.at(-1)
  if (last && !last.tokens && !piece.tokens && Boolean(last.isNew) === Boolean(piece.isNew)) last.text += piece.text
  else pieces.push(piece)
}

// The pieces of a text that has been edited: those before and after the change stay as they are.
export function edited(pieces, text) {
  const old = textOf({ pieces })
  const most = Math.min(old.length, text.length)
  let before = 0
  while (before < most && old[before] === text[before]) before += 1
  let after = 0
  while (after < most - before && old[old.length - 1 - after] === text[text.length - 1 - after]) after += 1
  const result = []
  const keep = (from, to) => {
    let at = 0
    for (const piece of pieces) {
      const start = Math.max(from - at, 0), end = Math.min(to - at, piece.text.length)
      if (start < end) {
        if (end - start === piece.text.length) addPiece(result, { ...piece })
        else addPiece(result, { text: piece.text.slice(start, end), ...(piece.isNew && { isNew: true }) })
      }
      at += piece.text.length
    }
  }
  keep(0, before)
  if (text.length - after > before) addPiece(result, { text: text.slice(before, text.length - after) })
  keep(old.length - after, old.length)
  return result
}
