// Ten samples, and a callback that throws at each; with `fatal` nobody catches, with `exit` the callback ends the process.
import {native} from '../../../src/native.js';
import {fixture} from '../helpers.js';

const [mode] = process.argv.slice(2);
const object = native.openObject(fixture('small_kinds'));
object.load();
let uncaught = 0;
if (!mode) {
	process.on('uncaughtException', () => {
		uncaught++;
	});
}

const reader = native.openRingBuffer(object.map('ring'), () => {
	if (mode === 'exit') {
		process.exit(7);
	}

	throw new Error(`sample ${reader.received - 1n}`);
});
object.program('emit').testRun({data: new Uint8Array(14), repeat: 10});
setTimeout(() => {
	console.log(JSON.stringify({uncaught, received: String(reader.received)}));
	reader.close();
}, 200);
