// The list of conversations at the side.

import { $, ask, download, el, iconButton } from './dom.js'

export class ConversationList {
  #shown = ''

  constructor(session, onSelect) {
    this.session = session
    this.onSelect = onSelect
    $('new-chat').addEventListener('click', () => this.#create('chat'))
    $('new-text').addEventListener('click', () => this.#create('text'))
    $('export').addEventListener('click', () => this.exportAll())
    $('import').addEventListener('click', () => $('import-file').click())
    $('import-file').addEventListener('change', () => this.#import())
  }

  #create(mode) {
    this.session.create(mode)
    this.onSelect()
  }

  show() {
    const { conversations, current } = this.session
    const key = JSON.stringify([current?.id, conversations.map((it) => [it.id, it.title, this.session.isBusy(it)])])
    if (key === this.#shown) return
    this.#shown = key
    const list = $('conversation-list')
    const focused = list.contains(document.activeElement) ? document.activeElement.closest('li')?.dataset.id : null
    list.replaceChildren(...conversations.map((conversation) => this.#item(conversation, conversation === current)))
    if (focused) (list.querySelector(`[data-id="${CSS.escape(focused)}"] .open`) ?? $('new-chat')).focus()
    $('no-conversations').hidden = conversations.length > 0
  }

  #item(conversation, isCurrent) {
    const title = conversation.title || 'Untitled'
    const item = el('li', { class: isCurrent ? 'current' : undefined },
      el('button', {
        type: 'button',
        class: `open ${conversation.mode}`,
        title,
        'aria-current': isCurrent ? 'true' : undefined,
        onclick: () => {
          this.session.select(conversation.id)
          this.onSelect()
        },
        ondblclick: () => this.#rename(conversation),
        onkeydown: ({ key }) => {
          if (key === 'F2') this.#rename(conversation)
          if (key === 'Delete') this.#remove(conversation)
        },
      },
      el('span', {}, title),
      this.session.isBusy(conversation) && el('span', { class: 'busy', title: 'An answer is being written' })),
      iconButton('edit', `Rename “${title}”`, () => this.#rename(conversation), { class: 'rename' }),
      iconButton('delete', `Delete “${title}”`, () => this.#remove(conversation), { class: 'delete' }))
    item.dataset.id = conversation.id
    return item
  }

  async #rename(conversation) {
    const title = await ask({ title: 'Rename', field: 'Title', value: conversation.title, confirm: 'Rename' })
    if (title?.trim()) this.session.rename(conversation, title.trim())
  }

  async #remove(conversation) {
    const text = `“${conversation.title || 'Untitled'}” will be gone from this browser.`
    const isSure = await ask({ title: 'Delete this conversation?', text, confirm: 'Delete', danger: true })
    if (isSure) this.session.remove(conversation)
  }

  exportAll() {
    const day = new Date().toISOString().slice(0, 10)
    download(`pyllama-conversations-${day}.json`, 'application/json', JSON.stringify(this.session.conversations, null, 1))
  }

  async #import() {
    const [file] = $('import-file').files
    $('import-file').value = ''
    if (!file) return
    try {
      const value = JSON.parse(await file.text())
      const n = this.session.import(Array.isArray(value) ? value : [value])
      this.notify?.(n === 1 ? 'One conversation was added.' : `${n} conversations were added.`)
    } catch {
      this.notify?.(`${file.name} does not hold conversations.`)
    }
  }
}
