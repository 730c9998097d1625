// The view of a chat: its messages, and the field below them.

import { firstWords } from './conversation.js'
import { $, announce, copyButton, el, exchange, iconButton, onceAFrame } from './dom.js'
import { imageFrom, imageFiles } from './images.js'
import { showMarkdown } from './markdown.js'
import { followTokens, hideCard, showTokens } from './tokens.js'

const IDEAS = [
  'Explain how a rainbow forms, in plain words.',
  'Give me three ideas for a rainy afternoon.',
  'Write a haiku about patience.',
]

// What is said of a finished answer: how fast it was, and why it ended unless of itself.
export function statsText({ stats, ended, truncated }) {
  const parts = []
  if (stats) {
    parts.push(`${count(stats.predicted_n)}, ${rate(stats.predicted_per_second)}`)
    parts.push(`prompt ${count(stats.prompt_n)}${stats.prompt_n ? `, ${rate(stats.prompt_per_second)}` : ''}`)
  }
  if (ended === 'limit') parts.push('limit reached')
  if (ended === 'stopped') parts.push('stopped')
  if (truncated) parts.push('the context was exceeded')
  return parts.join(' · ')
}

export function progressText({ note, n, seconds }) {
  return note || `${count(n)}${seconds > 0.2 ? `, ${rate(n / seconds)}` : ''}`
}

const count = (n) => `${n} token${n === 1 ? '' : 's'}`
const rate = (perSecond) => `${perSecond >= 100 ? perSecond.toFixed(0) : perSecond.toFixed(1)} tokens/s`

export class ChatView {
  #views = new WeakMap()  // what shows a message
  #images = []  // that go with the next message

  constructor(session) {
    this.session = session
    this.paint = onceAFrame(() => this.#paintLast())
    $('composer').addEventListener('submit', (event) => {
      event.preventDefault()
      this.submit()
    })
    $('message').addEventListener('input', () => this.#fit())
    $('message').addEventListener('keydown', (event) => {
      // While an input method is at work, Enter is its own.
      if (event.key !== 'Enter' || event.shiftKey || event.isComposing || matchMedia('(pointer: coarse)').matches) return
      event.preventDefault()
      this.submit()
    })
    $('stop').addEventListener('click', () => session.stop())
    $('system').addEventListener('change', () => session.setSystem($('system').value))
    $('to-end').addEventListener('click', () => this.#scrollToEnd(true))
    $('messages').addEventListener('scroll', () => this.#showWhetherAtEnd())
    followTokens($('messages'))
    this.#takeImages()
  }

  // ---- the field --------------------------------------------------------------------------------------------------------

  submit() {
    const text = $('message').value.trim()
    if ((!text && this.#images.length === 0) || this.session.isBusy(this.session.current)) return
    const images = this.#images.splice(0)
    $('message').value = ''
    $('message').focus()
    this.#showImages()
    this.#fit()
    this.session.send(text, images)
    this.#scrollToEnd(true)
  }

  #fit() {
    const field = $('message')
    field.style.height = 'auto'
    field.style.height = `${Math.min(field.scrollHeight, innerHeight * 0.4)}px`
  }

  // ---- images -----------------------------------------------------------------------------------------------------------

  // Whether the model can see.
  set takesImages(does) {
    const button = $('add-image')
    button.setAttribute('aria-disabled', String(!does))
    const label = does ? 'Add an image' : 'This model does not take images'
    button.title = label
    button.setAttribute('aria-label', label)
    this.#takes = does
  }

  #takes = false

  #takeImages() {
    $('add-image').addEventListener('click', () => {
      if (this.#takes) $('image-file').click()
      else this.notify?.('This model does not take images. It would need a model with a vision part.')
    })
    $('image-file').addEventListener('change', () => {
      this.#add(imageFiles($('image-file').files))
      $('image-file').value = ''
    })
    const add = (event, transfer) => {
      const files = imageFiles(transfer?.files ?? [])
      if (files.length === 0) return
      event.preventDefault()
      if (this.#takes) this.#add(files)
      else this.notify?.('This model does not take images.')
    }
    $('message').addEventListener('paste', (event) => add(event, event.clipboardData))
    $('chat').addEventListener('dragover', (event) => event.preventDefault())
    $('chat').addEventListener('drop', (event) => add(event, event.dataTransfer))
  }

  async #add(files) {
    for (const file of files) {
      try {
        this.#images.push(await imageFrom(file))
      } catch {
        this.notify?.(`${file.name} is not an image that this browser can read.`)
      }
    }
    this.#showImages()
    $('message').focus()
  }

  #showImages() {
    $('images').replaceChildren(...this.#images.map((url, i) => el('li', {},
      el('img', { src: url, alt: `Image ${i + 1}` }),
      iconButton('close', `Remove image ${i + 1}`, () => {
        this.#images.splice(i, 1)
        this.#showImages()
        $('message').focus()
      }))))
    $('images').hidden = this.#images.length === 0
  }

  // ---- messages ---------------------------------------------------------------------------------------------------------

  // Shows the conversation that is open.
  show() {
    hideCard()
    const { current } = this.session
    $('messages-list').replaceChildren()
    $('system').value = current.system
    $('system-box').open = false
    this.change()
    this.#fit()
    this.#scrollToEnd(true)
  }

  // Shows what has changed in it.
  change() {
    const { current } = this.session
    const { messages } = current
    const list = $('messages-list')
    $('welcome').hidden = messages.length > 0
    $('system-state').textContent = current.system.trim() ? firstWords(current.system, 60) : 'none'
    messages.forEach((message, i) => {
      const { element } = this.#viewOf(message)
      if (list.children[i] !== element) list.insertBefore(element, list.children[i] ?? null)
    })
    while (list.children.length > messages.length) list.lastElementChild.remove()
    messages.forEach((message, i) => this.#paintMessage(message, i === messages.length - 1))
    const isBusy = this.session.isBusy(current)
    if (list.ariaBusy === 'true' && !isBusy) announce('The answer is complete.')
    list.ariaBusy = String(isBusy)
    exchange(isBusy, $('send'), $('stop'))
    document.body.dataset.state = isBusy ? 'busy' : 'idle'
    this.#keepAtEnd(() => {})
  }

  #viewOf(message) {
    let view = this.#views.get(message)
    if (!view) this.#views.set(message, view = this.#newView(message))
    return view
  }

  #newView(message) {
    const isUser = message.role === 'user'
    const body = el('div', { class: 'body' })
    const foot = el('footer', {})
    const element = el('article', { class: `message ${message.role}`, 'aria-label': isUser ? 'You' : 'Answer' }, body, foot)
    return { element, body, foot, asTokens: true, isEditing: false }
  }

  #paintLast() {
    const message = this.session.current.messages.at(-1)
    if (message) this.#keepAtEnd(() => this.#paintMessage(message, true))
  }

  #paintMessage(message, isLast) {
    const view = this.#viewOf(message)
    if (view.isEditing) return
    const isBusy = isLast && this.session.isBusy(this.session.current)
    this.#paintBody(view, message, isBusy)
    if (isBusy && message.role === 'assistant') {
      view.foot.replaceChildren(el('span', { class: 'stats' }, progressText(this.session.progress(this.session.current))))
      view.foot.isFinal = false
      return
    }
    const { version, content, error, ended, pieces, stats } = message
    const key = JSON.stringify([isLast, version, content === '', error, ended, Boolean(pieces), view.asTokens, stats])
    if (view.foot.isFinal === key) return
    view.foot.isFinal = key
    this.#paintFoot(view, message, isLast)
  }

  #paintBody(view, message, isBusy) {
    const { body } = view
    const kind = message.role === 'user' ? 'plain' : message.pieces && view.asTokens ? 'tokens' : 'markdown'
    if (body.kind !== kind || body.version !== message.version) {
      body.replaceChildren()
      body.kind = kind
      body.version = message.version
      body.text = null
      body.className = `body ${kind}`
      body.pieces = 0
    }
    body.classList.toggle('waiting', isBusy && message.role === 'assistant' && message.content === '')
    if (kind === 'markdown') showMarkdown(body, message.content)
    else if (kind === 'tokens') {
      body.tabIndex = 0
      body.role = 'group'
      body.ariaLabel = 'Answer as tokens. The arrow keys show what else was likely.'
      showTokens(body, message.pieces)
    } else if (body.text !== message.content) {
      body.text = message.content
      body.replaceChildren(
        ...(message.images ?? []).map((url) => el('img', { src: url, alt: 'Your image' })), message.content)
    }
    if (kind !== 'tokens') body.removeAttribute('tabindex')
  }

  #paintFoot(view, message, isLast) {
    const isUser = message.role === 'user'
    const isNothing = message.content === '' && !message.images  // an answer that failed at once
    const actions = isNothing ? [] : [copyButton(() => message.content)]
    if (!isUser && isLast && !(isNothing && message.error)) {
      actions.push(iconButton('again', 'Answer again', () => this.session.regenerate(), { class: 'regenerate' }))
    }
    if (isLast && message.versions) actions.push(...this.#versions(view, message))
    if (!isNothing) {
      const label = isUser ? 'Edit and ask again' : 'Edit this answer'
      actions.push(iconButton('edit', label, () => this.#edit(view, message), { class: 'edit' }))
    }
    if (message.pieces) {
      const label = view.asTokens ? 'Show as formatted text' : 'Show probabilities'
      actions.push(iconButton(view.asTokens ? 'text' : 'chances', label, () => {
        view.asTokens = !view.asTokens
        this.#paintMessage(message, isLast)
        view.foot.querySelector('.as-tokens').focus()
      }, { class: 'as-tokens' }))
    }
    const error = message.error && el('p', { class: 'error', role: 'alert' }, message.error,
      isLast && el('button', { type: 'button', class: 'quiet', onclick: () => this.session.regenerate() }, 'Try again'))
    view.foot.replaceChildren(...[
      error,
      el('div', { class: 'actions', role: 'group', 'aria-label': isUser ? 'Your message' : 'This answer' }, ...actions),
      !isUser && el('span', { class: 'stats' }, statsText(message)),
    ].filter(Boolean))
  }

  // The way to the other answers to the same question.
  #versions(view, { versions, version }) {
    const to = (step, name, label, className) => iconButton(name, label, () => {
      this.session.showVersion(this.session.current.messages.at(-1), version + step)
      view.foot.querySelector(`.${className}:enabled, .other:enabled`)?.focus()
    }, { class: `other ${className}`, disabled: versions[version + step] === undefined })
    return [
      to(-1, 'left', 'The answer before', 'before'),
      el('span', { class: 'stats' }, `${version + 1} / ${versions.length}`),
      to(1, 'right', 'The answer after', 'after'),
    ]
  }

  #edit(view, message) {
    if (this.session.isBusy(this.session.current)) return
    const isUser = message.role === 'user'
    const field = el('textarea', { value: message.content, 'aria-label': isUser ? 'Your message' : 'The answer' })
    const end = (isDone) => {
      view.isEditing = false
      view.body.kind = view.foot.isFinal = null
      if (isDone && (field.value.trim() || !isUser)) this.session.edit(message, field.value)
      this.change()
      if (isDone && isUser) $('message').focus()
      else view.foot.querySelector('.edit')?.focus()
    }
    view.isEditing = true
    view.element.classList.add('editing')
    field.addEventListener('keydown', (event) => {
      if (event.key === 'Escape') {
        event.stopPropagation()
        end(false)
      } else if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) {
        event.stopPropagation()
        end(true)
      }
    })
    view.body.className = 'body editor'
    view.body.removeAttribute('tabindex')
    view.body.replaceChildren(field)
    view.foot.replaceChildren(el('div', { class: 'buttons' },
      el('button', { type: 'button', class: 'quiet', onclick: () => end(false) }, 'Cancel'),
      el('button', { type: 'button', class: 'primary', title: 'Ctrl + Enter', onclick: () => end(true) },
        isUser ? 'Send' : 'Save')))
    field.style.height = `${field.scrollHeight + 4}px`
    field.focus()
  }

  // ---- scrolling ----------------------------------------------------------------------------------------------------------

  #isAtEnd() {
    const box = $('messages')
    return box.scrollHeight - box.scrollTop - box.clientHeight < 60
  }

  #scrollToEnd(isAsked = false) {
    const box = $('messages')
    box.scrollTop = box.scrollHeight
    if (isAsked) this.#follows = true
    this.#showWhetherAtEnd()
  }

  #follows = true  // until the user scrolls away from the end

  #keepAtEnd(paint) {
    paint()
    if (this.#follows) this.#scrollToEnd()
    else this.#showWhetherAtEnd()
  }

  #showWhetherAtEnd() {
    this.#follows = this.#isAtEnd()
    $('to-end').hidden = this.#follows
  }

  // ---- the empty page -----------------------------------------------------------------------------------------------------

  showIdeas() {
    $('ideas').replaceChildren(...IDEAS.map((text) => el('li', {}, el('button', {
      type: 'button',
      onclick: () => {
        $('message').value = text
        this.submit()
      },
    }, text))))
  }
}
