// Reads JSON schemas, one a line; writes for each the grammar or the error, as JSON.
import { readFileSync } from 'node:fs'
import { schemaToGrammar } from '../public/json-schema-to-grammar.mjs'

for (const line of readFileSync(0, 'utf8').split('\n')) {
  if (!line) continue
  let answer
  try {
    answer = { grammar: schemaToGrammar(line) }
  } catch (error) {
    answer = { error: error.name === 'SchemaError' ? error.message : error.stack }
  }
  console.log(JSON.stringify(answer))
}
