/** stream-child ADDRESS PORT BYTES: sends random bytes after the server's greeting, and prints what they and what came back hash to. */
import {createHash, randomBytes} from 'node:crypto';
import {connect} from 'node:net';

const GREETING_END = 0x0a;
const PIECE = 65_536;

const [host, port, size] = process.argv.slice(2);
const sent = createHash('sha256');
const received = createHash('sha256');
let greeting = '';
let greeted = false;
let receivedBytes = 0;

const socket = connect(Number(port), host);
const take = (bytes: Buffer) => {
	received.update(bytes);
	receivedBytes += bytes.length;
};

socket.on('data', bytes => {
	if (greeted) {
		take(bytes);
		return;
	}

	const end = bytes.indexOf(GREETING_END);
	greeting += bytes.subarray(0, end === -1 ? bytes.length : end).toString();
	if (end !== -1) {
		greeted = true;
		take(bytes.subarray(end + 1));
	}
});
socket.once('connect', async () => {
	for (let left = Number(size); left > 0; left -= PIECE) {
		const bytes = randomBytes(Math.min(left, PIECE));
		sent.update(bytes);
		if (!socket.write(bytes)) {
			await new Promise(resolve => {
				socket.once('drain', resolve);
			});
		}
	}

	socket.end();
});
socket.once('close', () => {
	const {peer} = JSON.parse(greeting) as {peer: string};
	process.stdout.write(`${JSON.stringify({peer, sent: sent.digest('hex'), received: received.digest('hex'), receivedBytes})}\n`);
});
