// The view of a text that the model continues: one field, and the last continuation can be taken back or tried again.
//
// A field shows plain text only. Behind it lies a mirror of the same size with the same text, where what the model wrote is
// marked; the mirror also makes the field as high as its text. Tokens under the pointer are found in the mirror.

import { progressText, statsText } from './chat.js'
import { textOf } from './conversation.js'
import { $, el, exchange, onceAFrame } from './dom.js'
import { hideCard, showCard, tokenSpan } from './tokens.js'

export class TextView {
  #spans = new WeakMap()  // what shows a piece in the mirror

  constructor(session) {
    this.session = session
    this.paint = onceAFrame(() => this.#paint())
    $('continue').addEventListener('click', () => this.submit())
    $('text-stop').addEventListener('click', () => session.stop())
    $('undo').addEventListener('click', () => {
      session.undo()
      $('document').focus()
    })
    $('retry').addEventListener('click', () => {
      session.undo()
      session.continueText()
    })
    $('document').addEventListener('input', () => {
      hideCard()
      session.setText($('document').value)
    })
    this.#followTokens()
  }

  submit() {
    if (this.session.isBusy(this.session.current)) return
    this.#follows = true
    this.session.continueText()
  }

  show() {
    hideCard()
    this.#paint()
  }

  change() {
    this.#paint()
  }

  #follows = false  // whether the end stays in sight

  #paint() {
    const { session } = this
    const { current } = session
    if (current.mode !== 'text') return
    const isBusy = session.isBusy(current)
    const field = $('document')
    const text = textOf(current)
    // A field turns every kind of line break into one; to write the same again would move the cursor.
    if (field.value !== text.replace(/\r\n?/g, '\n')) field.value = text
    field.readOnly = isBusy
    this.#paintMirror(current.pieces)
    exchange(isBusy, $('continue'), $('text-stop'))
    $('undo').disabled = $('retry').disabled = isBusy || !current.before
    $('text-state').textContent = isBusy ? progressText(session.progress(current)) : statsText(current)
    $('text-error').textContent = current.error ?? ''
    document.body.dataset.state = isBusy ? 'busy' : 'idle'
    if (isBusy && this.#follows) $('paper').scrollTop = $('paper').scrollHeight
    if (!isBusy) this.#follows = false
  }

  #paintMirror(pieces) {
    const mirror = $('mirror')
    // Without a character in its end a last line that is empty would not count.
    const end = mirror.lastElementChild ?? mirror.appendChild(el('span', {}, '\u200b'))
    pieces.forEach((piece, i) => {
      let span = this.#spans.get(piece)
      if (!span) {
        span = piece.tokens ? tokenSpan(piece) : el('span', {}, piece.text)
        if (piece.isNew) span.classList.add('new')
        this.#spans.set(piece, span)
      }
      if (span.textContent !== piece.text) span.textContent = piece.text
      if (mirror.children[i] !== span) mirror.insertBefore(span, mirror.children[i])
    })
    while (mirror.children[pieces.length] !== end) mirror.children[pieces.length].remove()
  }

  // ---- probabilities ------------------------------------------------------------------------------------------------------

  #followTokens() {
    const field = $('document')
    field.addEventListener('pointermove', ({ clientX, clientY }) => {
      const span = document.elementsFromPoint(clientX, clientY).find((element) => element.classList.contains('token'))
      if (span) showCard(span)
      else hideCard()
    })
    field.addEventListener('pointerleave', hideCard)
    $('paper').addEventListener('scroll', hideCard)
    // The keys that move the cursor, and taps, show the token at the cursor.
    document.addEventListener('selectionchange', () => {
      if (document.activeElement !== field || field.selectionStart !== field.selectionEnd) return
      const span = this.#tokenAt(field.selectionStart)
      if (span) showCard(span)
      else hideCard()
    })
    field.addEventListener('blur', hideCard)
  }

  #tokenAt(place) {
    let at = 0
    for (const piece of this.session.current.pieces) {
      at += piece.text.length
      if (place < at) return piece.tokens && this.#spans.get(piece)
    }
    return null
  }
}
