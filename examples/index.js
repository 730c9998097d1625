// A completion with fetch, for Node 18 or later: node index.js [URL of the server]

const server = process.argv[2] ?? 'http://127.0.0.1:8080'
const prompt = `Building a website can be done in 10 simple steps:`

async function Test() {
  const response = await fetch(`${server}/completion`, {
    method: 'POST',
    body: JSON.stringify({
      prompt,
      n_predict: 512,
    }),
  })
  console.log((await response.json()).content)
}

Test()
