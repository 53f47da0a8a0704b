/**
web-child serve PORT: HTTP that sends each request's body back.
web-child ask ORIGIN REQUESTS MAX_BYTES: bodies of all sizes to it, over four connections that are kept; prints how many came back, how many were not as sent,
and over how many connections.
*/
import {createHash} from 'node:crypto';
import {Agent, createServer, request} from 'node:http';
import {buffer} from 'node:stream/consumers';

const CONNECTIONS = 4;
/** Coprime with any MAX_BYTES that is not its multiple: sizes neither repeat soon nor rise evenly. */
const STRIDE = 7919;

/** Bytes that any place's shift shows in. */
function bodyOf(index: number, bytes: number): Buffer {
	const piece = createHash('sha512').update(String(index)).digest();
	return Buffer.alloc(bytes, Buffer.concat([piece, Buffer.from([index & 255])]));
}

async function ask(origin: string, agent: Agent, sent: Buffer): Promise<Buffer> {
	return new Promise((resolve, reject) => {
		const asked = request(origin, {agent, method: 'POST'}, response => {
			buffer(response).then(resolve, reject);
		});
		asked.once('error', reject);
		asked.end(sent);
	});
}

const [what, where, requests, maxBytes] = process.argv.slice(2);
if (what === 'serve') {
	createServer((asked, response) => {
		asked.pipe(response);
	}).listen(Number(where), '::');
} else {
	const agent = new Agent({keepAlive: true, maxSockets: CONNECTIONS});
	const connections = new Set<unknown>();
	agent.on('free', socket => {
		connections.add(socket);
	});
	const result = {answers: 0, wrong: 0};
	let next = 0;
	await Promise.all(Array.from({length: CONNECTIONS}, async () => {
		while (next < Number(requests)) {
			const index = next++;
			const sent = bodyOf(index, index * STRIDE % Number(maxBytes));
			const received = await ask(where!, agent, sent);
			result.answers++;
			result.wrong += Number(!received.equals(sent));
		}
	}));
	agent.destroy();
	process.stdout.write(`${JSON.stringify({...result, connections: connections.size})}\n`);
}
