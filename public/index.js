// The page at /: puts its parts together. Each part is a module of its own:
//
//   session.js   the conversations, and the answers that are being written; no DOM    (conversation.js: one of them)
//   server.js    requests, waiting for the model, errors                              (completion.js: the client itself)
//   store.js     what the browser keeps
//   chat.js and text.js, the two views of a conversation                              (markdown.js, tokens.js, images.js)
//   list.js      the conversations at the left
//   settings.js  the panel at the right

import { ChatView } from './chat.js'
import { $, ask, icon } from './dom.js'
import { ConversationList } from './list.js'
import { apiKey, describe, modelFacts } from './server.js'
import { Session } from './session.js'
import { Settings } from './settings.js'
import { recall, remember } from './store.js'
import { TextView } from './text.js'
import { cardIsOpen, hideCard } from './tokens.js'

const settings = new Settings()
const session = new Session({ settings, askForKey })
const chat = new ChatView(session)
const text = new TextView(session)
const list = new ConversationList(session, () => {
  if (isNarrow()) panels.side.close()
  focusField()
})
chat.notify = list.notify = notify

const view = () => (session.current.mode === 'chat' ? chat : text)

session.addEventListener('list', () => list.show())
session.addEventListener('select', showCurrent)
session.addEventListener('change', ({ detail }) => {
  if (detail !== session.current) return
  showTitle()
  view().change()
})
session.addEventListener('grow', ({ detail }) => {
  if (detail === session.current) view().paint()
})
session.addEventListener('trouble', ({ detail }) => notify(detail))

function showCurrent() {
  const { mode } = session.current
  $('chat').hidden = mode !== 'chat'
  $('text').hidden = mode !== 'text'
  document.querySelector('.skip').href = mode === 'chat' ? '#message' : '#document'
  for (const radio of document.getElementsByName('mode')) radio.checked = radio.value === mode
  showTitle()
  view().show()
}

function showTitle() {
  const { title } = session.current
  $('title').textContent = title || (session.current.mode === 'chat' ? 'New chat' : 'New text')
  document.title = title ? `${title} – pyllama` : 'pyllama'
}

function focusField() {
  const field = $(session.current.mode === 'chat' ? 'message' : 'document')
  if (!matchMedia('(pointer: coarse)').matches) field.focus()  // on a phone the keyboard would jump up
}

for (const radio of document.getElementsByName('mode')) {
  radio.addEventListener('change', () => {
    const { mode } = session.current
    if (radio.value === mode) return
    session.create(radio.value)
  })
}

// ---- notices ------------------------------------------------------------------------------------------------------------

function notify(message) {
  $('notice-text').textContent = message
  $('notice').hidden = !message
}

$('notice-close').addEventListener('click', () => {
  notify('')
  focusField()
})

// Asks for the server's key, as often as it is refused; only one such question at a time.
let question = null
function askForKey() {
  question ??= ask({
    title: 'This server has an API key',
    text: apiKey.get() ? 'The key that is kept here is not the right one.' : 'It answers only those who know it.',
    field: 'API key', type: 'password', confirm: 'Use this key',
  }).then((key) => {
    question = null
    if (!key) return false
    apiKey.set(key)
    $('key').value = key
    return true
  })
  return question
}

$('key').value = apiKey.get()
$('key').addEventListener('change', () => apiKey.set($('key').value))

// ---- panels ---------------------------------------------------------------------------------------------------------------

// The side panels stand beside the conversation where there is room, and lie over it where there is not: then nothing behind
// them can be reached until they are closed.
const isNarrow = () => matchMedia('(max-width: 760px)').matches
const isMedium = () => matchMedia('(max-width: 1120px)').matches

class Panel {
  // covers(): does it lie over the conversation?
  constructor(name, covers) {
    this.panel = $(name)
    this.opener = $(`show-${name}`)
    this.closer = $(`hide-${name}`)
    this.covers = covers
    this.opener.addEventListener('click', () => this.toggle())
    this.closer.addEventListener('click', () => this.close(true))
  }

  get isOpen() {
    return !this.panel.hidden
  }

  toggle() {
    if (this.isOpen) this.close(true)
    else this.open(true)
  }

  open(isAsked = false) {
    this.panel.hidden = false
    this.#update()
    if (isAsked) this.closer.focus()
  }

  close(isAsked = false) {
    this.panel.hidden = true
    this.#update()
    if (isAsked) this.opener.focus()
  }

  #update() {
    this.opener.setAttribute('aria-expanded', String(this.isOpen))
    if (!this.covers()) remember(`${this.panel.id}-open`, this.isOpen)
    layOut()
  }
}

const panels = { side: new Panel('side', isNarrow), settings: new Panel('settings', isMedium) }

function layOut() {
  const covering = Object.values(panels).find((panel) => panel.isOpen && panel.covers())
  $('scrim').hidden = !covering
  document.querySelector('main').inert = Boolean(covering)
  for (const panel of Object.values(panels)) {
    panel.panel.classList.toggle('over', panel.covers())
    panel.panel.inert = Boolean(covering) && panel !== covering
  }
  $('show-side').hidden = panels.side.isOpen && !panels.side.covers()
}

function layOutAnew() {
  panels.side.panel.hidden = isNarrow() || !recall('side-open', true)
  panels.settings.panel.hidden = isMedium() || !recall('settings-open', false)
  for (const { opener, isOpen } of Object.values(panels)) opener.setAttribute('aria-expanded', String(isOpen))
  layOut()
}

const closeCovering = () => {
  const covering = Object.values(panels).find((panel) => panel.isOpen && panel.covers())
  covering?.close(true)
  return Boolean(covering)
}

$('scrim').addEventListener('click', closeCovering)
for (const width of ['(max-width: 760px)', '(max-width: 1120px)']) matchMedia(width).addEventListener('change', layOutAnew)

// ---- theme ----------------------------------------------------------------------------------------------------------------

const THEMES = ['system', 'light', 'dark']
const THEME_LABELS = { system: 'Theme: as the system has it', light: 'Theme: light', dark: 'Theme: dark' }

function showTheme() {
  const theme = recall('theme', 'system')
  if (theme === 'system') delete document.documentElement.dataset.theme
  else document.documentElement.dataset.theme = theme
  $('theme').replaceChildren(icon(theme))
  $('theme').title = THEME_LABELS[theme]
  $('theme').setAttribute('aria-label', THEME_LABELS[theme])
}

$('theme').addEventListener('click', () => {
  const next = THEMES[(THEMES.indexOf(recall('theme', 'system')) + 1) % THEMES.length]
  remember('theme', next === 'system' ? undefined : next)
  showTheme()
})

// ---- keys -----------------------------------------------------------------------------------------------------------------

$('keys').addEventListener('click', () => $('keys-dialog').showModal())

document.addEventListener('keydown', (event) => {
  if (document.querySelector('dialog[open]') || event.isComposing) return
  const isTyping = event.target.matches('input, textarea, select')
  const shortcut = {
    KeyN: () => {
      session.create(session.current.mode)
      focusField()
    },
    KeyC: () => panels.side.toggle(),
    KeyS: () => panels.settings.toggle(),
  }[event.code]
  if (event.altKey && !event.ctrlKey && !event.metaKey && shortcut) {
    event.preventDefault()
    shortcut()
  } else if (event.key === 'Escape') {
    if (cardIsOpen()) hideCard()
    else if (!closeCovering()) session.stop()
  } else if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) {
    event.preventDefault()
    view().submit()
  } else if (event.key === '/' && !isTyping) {
    event.preventDefault()
    focusField()
  } else if (event.key === '?' && !isTyping) {
    $('keys-dialog').showModal()
  }
})

// ---- the beginning, and the end ---------------------------------------------------------------------------------------------

async function meetModel() {
  try {
    const { settings: defaults, takesImages } = await modelFacts(notify)
    notify('')
    settings.defaults = defaults
    chat.takesImages = takesImages
    const name = defaults.model.split('/').pop().replace(/\.gguf$/i, '')
    $('model').textContent = `${name} · ${defaults.n_ctx} tokens of context`
  } catch (error) {
    notify(describe(error))
  }
}

window.addEventListener('pagehide', () => session.leave())
window.addEventListener('pageshow', ({ persisted }) => {
  if (persisted) session.comeBack()
})
document.addEventListener('visibilitychange', () => {
  if (document.visibilityState === 'visible') session.refresh()
})

showTheme()
layOutAnew()
chat.showIdeas()
await Promise.all([session.load().then(focusField), meetModel()])
