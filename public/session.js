// The conversations, and the answers that are being written in them. Views listen and call; there is no DOM here.
//
// Events: 'list' (what the list of conversations shows), 'select' (another conversation), and with the conversation as detail
// 'change' (anything in it) and 'grow' (its last message or piece has got more text); 'trouble' with a message for the user.

import {
  addPiece, chatMessages, edited, isEmpty, newConversation, restored, textOf, titleOf, VERSION, versionsOf,
} from './conversation.js'
import { answer, describe } from './server.js'
import { deleteConversation, loadConversations, recall, remember, saveConversation } from './store.js'

const SAVE_EVERY = 2000  // milliseconds, while an answer is being written
const SAVE_TYPED = 500  // milliseconds after the last key
const TEXT_LIMIT = 256  // tokens that continue a text where no limit is set: a text has no end of its own

export class Session extends EventTarget {
  conversations = []  // the latest first; those without content are not among them
  current = null
  #running = new Map()  // what is going on, by a conversation's id
  #unsaved = new Map()  // timers, by conversations that have been typed in

  // settings: see there; askForKey: see server.js
  constructor({ settings, askForKey }) {
    super()
    this.settings = settings
    this.askForKey = askForKey
  }

  #tell(name, detail) {
    this.dispatchEvent(Object.assign(new Event(name), { detail }))
  }

  // ---- conversations ----------------------------------------------------------------------------------------------------

  async load() {
    try {
      await this.comeBack()
      this.conversations = await loadConversations()
    } catch (error) {
      this.#tell('trouble', `This browser does not keep conversations: ${error.message}`)
    }
    this.#sort()
    const last = this.conversations.find(({ id }) => id === recall('current'))
    if (last) this.select(last.id)
    else this.create(recall('mode', 'chat'))
  }

  // Conversations that another window has changed meanwhile.
  async refresh() {
    const stored = await loadConversations().catch(() => null)
    if (stored === null) return
    const kept = new Map([...this.conversations, this.current].map((conversation) => [conversation.id, conversation]))
    this.conversations = stored.map((conversation) => {
      const own = kept.get(conversation.id)
      if (!own || this.#running.has(own.id)) return own ?? conversation
      return own.changed >= conversation.changed ? own : Object.assign(own, conversation)
    })
    this.#sort()
    this.#tell('change', this.current)
  }

  create(mode = 'chat') {
    remember('mode', mode)
    if (this.current && isEmpty(this.current)) this.current.mode = mode
    else this.current = newConversation(mode)
    remember('current', undefined)
    this.#tell('list')
    this.#tell('select')
  }

  select(id) {
    this.current = this.conversations.find((conversation) => conversation.id === id)
    remember('current', id)
    this.#tell('list')
    this.#tell('select')
  }

  rename(conversation, title) {
    Object.assign(conversation, { title, isNamed: true })
    this.#changed(conversation)
  }

  async remove(conversation) {
    this.stop(conversation)
    this.conversations = this.conversations.filter(({ id }) => id !== conversation.id)
    if (this.current === conversation) {
      this.current = null
      this.create(conversation.mode)
    }
    this.#tell('list')
    await deleteConversation(conversation.id).catch((error) => this.#tell('trouble', error.message))
  }

  // Takes conversations as export writes them; those that are there already stay as they are.
  import(conversations) {
    const known = new Set(this.conversations.map(({ id }) => id))
    const fresh = conversations.map(restored).filter((it) => it && !known.has(it.id))
    this.conversations.push(...fresh)
    fresh.forEach((conversation) => this.#save(conversation))
    this.#sort()
    return fresh.length
  }

  // After a change that a user has made or an answer has brought.
  #changed(conversation, save = (it) => this.#save(it)) {
    conversation.changed = Date.now()
    if (!conversation.isNamed) conversation.title = titleOf(conversation)
    if (!isEmpty(conversation) && !this.conversations.includes(conversation)) {
      this.conversations.push(conversation)
      if (conversation === this.current) remember('current', conversation.id)
    }
    this.#sort()
    save(conversation)
    this.#tell('change', conversation)
  }

  #sort() {
    this.conversations.sort((a, b) => b.changed - a.changed)
    this.#tell('list')
  }

  #save(conversation) {
    if (!this.conversations.includes(conversation)) return
    clearTimeout(this.#unsaved.get(conversation))
    this.#unsaved.delete(conversation)
    saveConversation(conversation).catch((error) => {
      this.#tell('trouble', `This conversation could not be kept: ${error.message}`)
    })
  }

  #saveSoon(conversation) {
    clearTimeout(this.#unsaved.get(conversation))
    this.#unsaved.set(conversation, setTimeout(() => this.#save(conversation), SAVE_TYPED))
  }

  // What is being written is kept, too, when the page is left. There is no time then to wait for a database.
  leave() {
    const unsaved = this.conversations.filter((it) => this.#unsaved.has(it) || this.isBusy(it))
    remember('unsaved', unsaved.length ? unsaved : undefined)
    for (const conversation of unsaved) this.stop(conversation)
  }

  // After that, in the same page or a new one.
  async comeBack() {
    await Promise.all(recall('unsaved', []).map(saveConversation))
    remember('unsaved', undefined)
  }

  // ---- answers ----------------------------------------------------------------------------------------------------------

  isBusy = (conversation) => this.#running.has(conversation.id)

  // What is going on in a conversation: { note, n, seconds }, or undefined.
  progress(conversation) {
    const run = this.#running.get(conversation.id)
    return run && { note: run.note, n: run.n, seconds: (performance.now() - run.began) / 1000 }
  }

  stop(conversation = this.current) {
    const run = this.#running.get(conversation.id)
    if (!run) return
    run.isStopped = true
    run.controller.abort()
  }

  // Sends a message in a chat.
  send(content, images = []) {
    const conversation = this.current
    conversation.messages.push({ role: 'user', content, ...(images.length && { images }) })
    return this.#answer(conversation)
  }

  // Answers a chat's last question once more. The answers before are kept beside the new one.
  regenerate() {
    const { messages } = this.current
    const last = messages.at(-1)?.role === 'assistant' ? messages.pop() : null
    return this.#answer(this.current, last ? versionsOf(last).filter(({ content }) => content !== '') : [])
  }

  // Shows another one of the answers to a question.
  showVersion(message, version) {
    const versions = versionsOf(message)
    for (const name of VERSION) delete message[name]
    Object.assign(message, versions[version], { versions, version })
    this.#changed(this.current)
  }

  // Changes a message. What follows a changed question is dropped, and it is answered anew.
  async edit(message, content) {
    const conversation = this.current
    message.content = content
    if (message.role === 'user') {
      conversation.messages.length = conversation.messages.indexOf(message) + 1
      await this.#answer(conversation)
    } else {
      delete message.pieces
      this.#changed(conversation)
    }
  }

  setSystem(text) {
    this.current.system = text
    this.#changed(this.current)
  }

  // Continues a text.
  async continueText() {
    const conversation = this.current
    const prompt = textOf(conversation)
    const before = conversation.pieces.map((piece) => ({ ...piece }))
    Object.assign(conversation, { before, ended: undefined, stats: undefined, error: undefined })
    const limit = this.settings.isEndless ? { n_predict: TEXT_LIMIT } : {}
    const request = async () => ({ ...(await this.settings.options()), ...limit, prompt })
    const add = (part) => addPiece(conversation.pieces, { ...part, isNew: true })
    await this.#run(conversation, request, conversation, add)
  }

  // Takes the last continuation back.
  undo() {
    const conversation = this.current
    const { before } = conversation
    Object.assign(conversation, { pieces: before, before: null, ended: undefined, stats: undefined, error: undefined })
    this.#changed(conversation)
  }

  // What somebody has typed into a text.
  setText(text) {
    const conversation = this.current
    conversation.pieces = edited(conversation.pieces, text)
    conversation.before = null
    this.#changed(conversation, (it) => this.#saveSoon(it))
  }

  async #answer(conversation, versions = []) {
    const messages = chatMessages(conversation)
    const request = async () => ({ ...(await this.settings.options()), messages })
    const message = { role: 'assistant', content: '' }
    if (versions.length) Object.assign(message, { versions: [...versions, {}], version: versions.length })
    conversation.messages.push(message)
    await this.#run(conversation, request, message, (part) => {
      message.content += part.text
      if (part.tokens) (message.pieces ??= []).push(part)
    })
  }

  // Asks the server what request() returns; add(part) takes the parts, and `result` gets what there is to say in the end.
  async #run(conversation, request, result, add) {
    if (this.isBusy(conversation)) return
    const controller = new AbortController()
    const run = { controller, began: performance.now(), n: 0, note: 'Reading the prompt …', isStopped: false }
    this.#running.set(conversation.id, run)
    this.#changed(conversation)
    let saved = performance.now()
    try {
      const onWait = (note) => {
        run.note = note
        this.#tell('grow', conversation)
      }
      for await (const part of answer(await request(), { controller, onWait, askForKey: this.askForKey })) {
        if (part.text || part.tokens) {
          if (run.n === 0) Object.assign(run, { note: '', began: performance.now() })
          run.n += part.tokens?.length || 1
          add({ text: part.text, ...(part.tokens && { tokens: part.tokens }) })
        }
        if (part.ended) Object.assign(result, { ended: part.ended, stats: part.timings, truncated: part.truncated })
        this.#tell('grow', conversation)
        if (performance.now() - saved > SAVE_EVERY) {
          saved = performance.now()
          this.#save(conversation)
        }
      }
    } catch (error) {
      if (run.isStopped) result.ended = 'stopped'
      else result.error = describe(error)
    } finally {
      this.#running.delete(conversation.id)
      this.#changed(conversation)
    }
  }
}
