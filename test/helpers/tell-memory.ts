/**
Preloaded (`--import`) into a process whose memory a test watches: at SIGUSR2 it collects all garbage, then says on stderr what JavaScript holds: `memory BYTES`.
*/
import {setFlagsFromString} from 'node:v8';
import {runInNewContext} from 'node:vm';

setFlagsFromString('--expose-gc');
const collectGarbage = runInNewContext('gc') as () => void;

process.on('SIGUSR2', () => {
	collectGarbage();
	// What was freed by finalizers of the first.
	setImmediate(() => {
		collectGarbage();
		const {heapUsed, external} = process.memoryUsage();
		process.stderr.write(`memory ${heapUsed + external}\n`);
	});
});
