/**
chatter-child HOST PORT ROUNDS BYTES: that many round trips with an echo server that greets first, and says whether all came back. Each line on its input is
ROUNDS BYTES again, on the same connection; at the input's end it closes.
*/
import {randomBytes} from 'node:crypto';
import {once} from 'node:events';
import {connect} from 'node:net';
import {createInterface} from 'node:readline';

const [host, port, ...first] = process.argv.slice(2);
const socket = connect({host: host!, port: Number(port), noDelay: true});
let failure = '';
socket.on('error', error => {
	failure = (error as NodeJS.ErrnoException).code ?? error.message;
});
await once(socket, 'data');

async function chat(rounds: number, bytes: number): Promise<void> {
	let wrong = 0;
	let done = 0;
	for (; done < rounds && failure === '' && !socket.destroyed; done++) {
		const sent = randomBytes(bytes);
		const received: Buffer[] = [];
		let count = 0;
		await new Promise<void>(resolve => {
			const onData = (chunk: Buffer) => {
				received.push(chunk);
				count += chunk.length;
				if (count >= sent.length) {
					end();
				}
			};

			const end = () => {
				socket.off('data', onData);
				socket.off('close', end);
				resolve();
			};

			socket.on('data', onData);
			socket.on('close', end);
			socket.write(sent);
		});
		wrong += Number(!Buffer.concat(received).equals(sent));
	}

	process.stdout.write(`${JSON.stringify({rounds: done, wrong: failure === '' ? wrong : 0, failure})}\n`);
}

await chat(Number(first[0]), Number(first[1]));
for await (const line of createInterface(process.stdin)) {
	const [rounds, bytes] = line.split(' ').map(Number);
	await chat(rounds!, bytes!);
}

socket.destroy();
