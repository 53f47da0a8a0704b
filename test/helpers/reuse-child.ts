/** reuse-child STEPS: one socket a list of `ADDRESS PORT` or `unspec`; prints what each connect gave and who the peer is then. */
import {addressFromBytes, addressToBytes} from '../../src/maps/address.js';
import {native} from '../../src/native.js';

const AF_INET = 2;
const AF_INET6 = 10;

function socketAddress(address: string, port: number): Uint8Array {
	const v6 = address.includes(':');
	const bytes = new Uint8Array(v6 ? 28 : 16);
	const view = new DataView(bytes.buffer);
	view.setUint16(0, v6 ? AF_INET6 : AF_INET, true);
	view.setUint16(2, port);
	bytes.set(v6 ? addressToBytes(address) : addressToBytes(address).subarray(12), v6 ? 8 : 4);
	return bytes;
}

const attempt = (act: () => string) => {
	try {
		return act();
	} catch (error) {
		return (error as NodeJS.ErrnoException).code!;
	}
};

const [lists] = process.argv.slice(2);
const netns = native.openNetns('/proc/self/ns/net');
for (const steps of JSON.parse(lists!) as string[][]) {
	const socket = netns.socket(steps[0]!.includes(':') ? AF_INET6 : AF_INET, 1, 0);
	const seen = steps.map(step => {
		const [address = '', port = ''] = step.split(' ');
		const outcome = attempt(() => {
			native.connect(socket, address === 'unspec' ? new Uint8Array(16) : socketAddress(address, Number(port)));
			return 'ok';
		});
		const peer = attempt(() => {
			const bytes = native.getpeername(socket);
			return addressFromBytes(bytes.length === 28 ? bytes.subarray(8, 24) : bytes.subarray(4, 8));
		});
		return `${outcome} ${peer}`;
	});
	native.closeFd(socket);
	process.stdout.write(`${JSON.stringify(seen)}\n`);
}
